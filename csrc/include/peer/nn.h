// The modules: the layer, its parts, and the normalisations of its queries.
#pragma once

#include <peer/nn/experts.h>
#include <peer/nn/grid.h>
#include <peer/nn/norms.h>
#include <peer/nn/peer.h>
#include <peer/nn/router.h>
