# The kernels, which do not depend on torch. Those for the CPU are the target peer_kernels, for libpeer.so and for the C++ tests. Those for
# CUDA are a list, for cmake/Cuda.cmake and for the tests that run them on the CPU.

# Compiled once per capability.
set(PEER_CPU_KERNELS
    csrc/kernels/cpu/expert_mlp.cpp
    csrc/kernels/cpu/product_key_topk.cpp
    csrc/kernels/cpu/table_grad.cpp
    csrc/kernels/cpu/table_update.cpp)

set(PEER_CUDA_KERNELS
    csrc/kernels/cuda/expert_mlp.cu
    csrc/kernels/cuda/product_key_topk.cu
    csrc/kernels/cuda/product_key_topk_backward.cu
    csrc/kernels/cuda/product_key_topk_masked.cu
    csrc/kernels/cuda/segments.cu
    csrc/kernels/cuda/table_grad.cu
    csrc/kernels/cuda/table_update.cu)

# The first capability runs on any processor of the architecture.
set(PEER_CAPABILITIES baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND PEER_CAPABILITIES avx2 avx512)
endif()
set(PEER_FLAGS_baseline "")
set(PEER_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(PEER_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)

# Kernels read neither errno nor floating-point exceptions, and both would prevent vectorisation. No flag here may reorder sums or assume
# that NaN and infinity do not occur.
set(PEER_KERNEL_FLAGS -fno-math-errno -fno-trapping-math)
if(CMAKE_BUILD_TYPE STREQUAL "Release" AND NOT PEER_SANITIZE)
  list(APPEND PEER_KERNEL_FLAGS -O3)
endif()

add_library(peer_kernels_common OBJECT csrc/kernels/cpu/dispatch.cpp csrc/kernels/cpu/segments.cpp)
target_include_directories(peer_kernels_common PRIVATE csrc)
target_compile_options(peer_kernels_common PRIVATE ${PEER_KERNEL_FLAGS})

# An interface of objects, not an archive. The linker keeps the first of several weak definitions. The baseline's objects come first, so no
# function of a newer capability can replace one of the baseline.
add_library(peer_kernels INTERFACE)
target_include_directories(peer_kernels INTERFACE csrc)
target_sources(peer_kernels INTERFACE $<TARGET_OBJECTS:peer_kernels_common>)
foreach(capability IN LISTS PEER_CAPABILITIES)
  add_library(peer_kernels_${capability} OBJECT ${PEER_CPU_KERNELS})
  target_include_directories(peer_kernels_${capability} PRIVATE csrc)
  target_compile_definitions(peer_kernels_${capability} PRIVATE PEER_CAPABILITY=${capability})
  target_compile_options(peer_kernels_${capability} PRIVATE ${PEER_KERNEL_FLAGS} ${PEER_FLAGS_${capability}})
  target_sources(peer_kernels INTERFACE $<TARGET_OBJECTS:peer_kernels_${capability}>)
endforeach()
