// All of peer for C++ programs: the operators as functions, the modules, and their files.
//
// Where only the operators are wanted, <peer/functional.h> compiles in a fraction of the time.
#pragma once

#include <peer/functional.h>
#include <peer/nn.h>
#include <peer/state_dict.h>
#include <peer/version.h>
