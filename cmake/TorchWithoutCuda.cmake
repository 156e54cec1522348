# Torch's headers and CPU libraries as the imported target peer_torch. find_package(Torch) would fail without a CUDA toolkit if torch was built
# with CUDA, although a CPU build needs no toolkit.
#
# In:   TORCH_DIR    the directory of the torch Python package; if empty, that of PEER_PYTHON
# Out:  peer_torch   imported target
#       TORCH_DIR, PEER_TORCH_VERSION (2.15.0+cu132), PEER_TORCH_MINOR (2.15), PEER_TORCH_CUDA (13.2, or empty), cxx11_abi

if(NOT TORCH_DIR)
  # find_spec locates the package without importing it; the import takes seconds.
  execute_process(
    COMMAND "${PEER_PYTHON}" -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE TORCH_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "peer: could not run ${PEER_PYTHON} to find torch; set another interpreter with -DPEER_PYTHON=...")
  endif()
  if(NOT TORCH_DIR)
    message(FATAL_ERROR "peer: ${PEER_PYTHON} has no torch. Set an interpreter that has one, -DPEER_PYTHON=/path/to/venv/bin/python, "
                        "or the directory of the package, -DTORCH_DIR=/path/to/site-packages/torch. Or install torch: ${PEER_PYTHON} -m pip install torch")
  endif()
endif()

foreach(needed version.py include/ATen/ATen.h lib/libtorch_cpu.so lib/libc10.so)
  if(NOT EXISTS "${TORCH_DIR}/${needed}")
    message(FATAL_ERROR "peer: TORCH_DIR=${TORCH_DIR} is not the directory of an installed torch package: it has no ${needed}")
  endif()
endforeach()

file(STRINGS "${TORCH_DIR}/version.py" version_line REGEX "^__version__")
string(REGEX REPLACE ".*'([^']+)'.*" "\\1" PEER_TORCH_VERSION "${version_line}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" PEER_TORCH_MINOR "${PEER_TORCH_VERSION}")
if(PEER_TORCH_MINOR VERSION_LESS 2.11)
  message(FATAL_ERROR "peer: torch ${PEER_TORCH_VERSION} in ${TORCH_DIR} is too old, 2.11 is the oldest supported")
endif()
file(STRINGS "${TORCH_DIR}/version.py" cuda_line REGEX "^cuda")
set(PEER_TORCH_CUDA "")
if(cuda_line MATCHES "'([^']+)'")
  set(PEER_TORCH_CUDA "${CMAKE_MATCH_1}")
endif()

# The ABI of the C++ library that torch was compiled with, as its CMake package states it.
set(cxx11_abi 1)
if(EXISTS "${TORCH_DIR}/share/cmake/Torch/TorchConfig.cmake")
  file(STRINGS "${TORCH_DIR}/share/cmake/Torch/TorchConfig.cmake" abi_line REGEX "_GLIBCXX_USE_CXX11_ABI=[01]")
  if(abi_line MATCHES "_GLIBCXX_USE_CXX11_ABI=([01])")
    set(cxx11_abi ${CMAKE_MATCH_1})
  endif()
endif()

add_library(peer_torch INTERFACE IMPORTED)
set_target_properties(
  peer_torch
  PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${TORCH_DIR}/include;${TORCH_DIR}/include/torch/csrc/api/include"
             INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=${cxx11_abi}"
             INTERFACE_LINK_LIBRARIES "${TORCH_DIR}/lib/libtorch_cpu.so;${TORCH_DIR}/lib/libc10.so")
