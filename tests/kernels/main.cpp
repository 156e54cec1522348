// Catch2 version 3 brings its own main in a library; version 2 wants one to be asked for.
#if !__has_include(<catch2/catch_all.hpp>)
#define CATCH_CONFIG_MAIN
#endif
#include "catch.hpp"
