# libpeer.so: the operators, which it registers with Torch, their kernels, and the modules for C++ programs. It does not depend on Python.

include(cmake/TorchWithoutCuda.cmake)
set(PEER_CUDA_INFO "null")
if(PEER_CUDA)
  include(cmake/Cuda.cmake)
elseif(PEER_EMULATE_CUDA)
  include(tests/emulated_cuda/EmulatedCuda.cmake)
endif()

add_library(
  peer SHARED
  csrc/nn/experts.cpp
  csrc/nn/grid.cpp
  csrc/nn/growth.cpp
  csrc/nn/masks.cpp
  csrc/nn/norms.cpp
  csrc/nn/peer.cpp
  csrc/nn/router.cpp
  csrc/nn/state_dict.cpp
  csrc/nn/state_file.cpp
  csrc/ops/build_info.cpp
  csrc/ops/expert_mlp.cpp
  csrc/ops/fused_update.cpp
  csrc/ops/product_key_topk.cpp
  csrc/ops/table_update.cpp
  csrc/ops/autocast/expert_mlp.cpp
  csrc/ops/autocast/product_key_topk.cpp
  csrc/ops/autograd/expert_mlp.cpp
  csrc/ops/autograd/expert_mlp_derivative.cpp
  csrc/ops/autograd/product_key_topk.cpp
  csrc/ops/autograd/table_update.cpp
  csrc/ops/cpu/expert_mlp.cpp
  csrc/ops/cpu/common.cpp
  csrc/ops/cpu/fused_update.cpp
  csrc/ops/cpu/huge_pages.cpp
  csrc/ops/cpu/product_key_topk.cpp
  csrc/ops/cpu/table_update.cpp
  csrc/ops/meta/expert_mlp.cpp
  csrc/ops/meta/fused_update.cpp
  csrc/ops/meta/product_key_topk.cpp
  csrc/ops/meta/table_update.cpp)
target_link_libraries(peer PRIVATE peer_kernels peer_torch)
if(TARGET peer_cuda_kernels)
  target_sources(
    peer
    PRIVATE csrc/ops/cuda/expert_mlp.cpp
            csrc/ops/cuda/common.cpp
            csrc/ops/cuda/distinct_ids.cpp
            csrc/ops/cuda/fused_update.cpp
            csrc/ops/cuda/product_key_topk.cpp
            csrc/ops/cuda/table_update.cpp
            $<TARGET_OBJECTS:peer_cuda_kernels>)
  target_link_libraries(peer PRIVATE peer_torch_cuda)
else()
  target_sources(peer PRIVATE csrc/ops/no_cuda.cpp)
endif()

# Torch's headers take most of the time that the library takes to compile.
target_precompile_headers(peer PRIVATE <ATen/ATen.h> <torch/library.h>)

target_include_directories(peer PRIVATE csrc csrc/include "${CMAKE_CURRENT_BINARY_DIR}/generated")
set(PEER_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set_source_files_properties(
  csrc/ops/build_info.cpp PROPERTIES COMPILE_DEFINITIONS "PEER_COMPILER=\"${PEER_COMPILER}\";PEER_CUDA_INFO=R\"(${PEER_CUDA_INFO})\"")

# at::parallel_for is header code and serial unless compiled with OpenMP. The flag is for compilation only: linking with it would add the
# system's libgomp as a second runtime, which torch.set_num_threads does not control. The loader finds the GOMP_* symbols in the runtime
# of libtorch_cpu.so.
target_compile_options(peer PRIVATE -fopenmp)

add_custom_command(
  TARGET peer
  POST_BUILD
  COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} -DLIBRARY=$<TARGET_FILE:peer> -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/CheckUndefined.cmake
  VERBATIM)

# In an installation, peer and torch are in the same directory. Elsewhere, such as in a checkout, torch is imported before the library is
# loaded, and the loader uses the libraries that are already in the process.
set_target_properties(peer PROPERTIES LINKER_LANGUAGE CXX BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/../../torch/lib" INSTALL_REMOVE_ENVIRONMENT_RPATH ON)

# The build record. `import peer` checks it before it loads the library, and bug reports contain it.
set(PEER_CPU_CAPABILITIES "${PEER_CAPABILITIES}")
list(TRANSFORM PEER_CPU_CAPABILITIES REPLACE "^baseline$" "default")
list(JOIN PEER_CPU_CAPABILITIES "\", \"" PEER_CPU_CAPABILITIES)
if(PEER_TORCH_CUDA)
  set(torch_cuda "\"${PEER_TORCH_CUDA}\"")
else()
  set(torch_cuda "null")
endif()
string(REGEX REPLACE "([\\\\\"])" "\\\\\\1" cxx_flags "${CMAKE_CXX_FLAGS}")
file(
  CONFIGURE
  OUTPUT generated/_build_info.json
  CONTENT
    "{
  \"peer\": \"@peer_VERSION@\",
  \"torch\": \"@PEER_TORCH_VERSION@\",
  \"torch_minor\": \"@PEER_TORCH_MINOR@\",
  \"torch_cuda\": @torch_cuda@,
  \"cuda\": @PEER_CUDA_INFO@,
  \"cpu_capabilities\": [\"@PEER_CPU_CAPABILITIES@\"],
  \"compiler\": \"@PEER_COMPILER@\",
  \"build_type\": \"@CMAKE_BUILD_TYPE@\",
  \"cxx_flags\": \"@cxx_flags@\",
  \"cmake\": \"@CMAKE_VERSION@\"
}
"
  @ONLY)

include(cmake/Package.cmake)
