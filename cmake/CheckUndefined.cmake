# Fails if the library refers to a function of its own that no source of it defines. The linker would say so with -z defs, but the
# GOMP_* symbols are left open on purpose.
#
#   cmake -DNM=nm -DLIBRARY=libpeer.so -P CheckUndefined.cmake
execute_process(COMMAND "${NM}" --undefined-only "${LIBRARY}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "_Z[A-Z]*N?K?4peer[^\n]*" missing "${symbols}")
if(missing)
  list(JOIN missing "\n  " missing)
  message(FATAL_ERROR "peer: used, but defined in no source that CMake lists:\n  ${missing}")
endif()
