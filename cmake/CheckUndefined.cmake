# Fails if the library uses one of its own functions that no source defines. The linker option -z defs would also reject the GOMP_* symbols,
# which stay undefined on purpose.
#
#   cmake -DNM=nm -DLIBRARY=libpeer.so -P CheckUndefined.cmake
execute_process(COMMAND "${NM}" --undefined-only "${LIBRARY}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "_Z[A-Z]*N?K?4peer[^\n]*" missing "${symbols}")
if(missing)
  list(JOIN missing "\n  " missing)
  message(FATAL_ERROR "peer: these functions are used, but no source in CMake's list defines them:\n  ${missing}")
endif()
