# Fails if an object of one capability defines a weak symbol outside the capability's namespace: the linker could use it for an object of
# another capability. See csrc/kernels/cpu/capability.h.
#
#   cmake -DNM=nm -DCAPABILITY=avx2 "-DOBJECTS=a.o,b.o" -P check_symbols.cmake
string(REPLACE "," ";" OBJECTS "${OBJECTS}")
execute_process(COMMAND "${NM}" --demangle --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "peer::cpu::${CAPABILITY}::")
list(FILTER weak EXCLUDE REGEX "DW\\.ref\\.__gxx_personality")
if(weak)
  list(JOIN weak "\n  " weak)
  message(FATAL_ERROR "shared between capabilities:\n  ${weak}")
endif()
