// All of peer for C++ programs: the operators as functions, the modules, and their files.
//
// <peer/functional.h> has only the operators, and compiles in a fraction of the time.
#pragma once

#include <peer/functional.h>
#include <peer/nn.h>
#include <peer/state_dict.h>
#include <peer/version.h>
