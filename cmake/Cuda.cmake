# The CUDA kernels as the target peer_cuda_kernels, and what the library needs besides them as peer_torch_cuda. Only where PEER_CUDA is on,
# after TorchWithoutCuda.cmake.
#
# In:   CMAKE_CUDA_ARCHITECTURES   the GPUs to compile for, required
# Out:  peer_cuda_kernels          objects
#       peer_torch_cuda            imported target: Torch's streams and memory, and the runtime that the kernels are started with
#       PEER_CUDA_INFO             how the kernels are built, as JSON

if(CMAKE_VERSION VERSION_LESS 3.26)
  message(FATAL_ERROR "peer: the CUDA kernels need CMake 3.26, which knows C++20 for nvcc; this is ${CMAKE_VERSION}. Type: pip install cmake")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES)
  message(FATAL_ERROR "peer: name the GPUs to compile for: -DCMAKE_CUDA_ARCHITECTURES=native for those of this machine, or such as \"80-real;90\"")
endif()
if(NOT PEER_TORCH_CUDA OR NOT EXISTS "${TORCH_DIR}/lib/libc10_cuda.so")
  message(FATAL_ERROR "peer: PEER_CUDA is on, but torch ${PEER_TORCH_VERSION} in ${TORCH_DIR} has no CUDA")
endif()

# nvcc need not be on PATH: FindCUDAToolkit knows more places than the language does.
find_package(CUDAToolkit REQUIRED)
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
endif()
if(NOT CMAKE_CUDA_HOST_COMPILER)
  set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
endif()
enable_language(CUDA)

set(toolkit "${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}")
string(REGEX MATCH "^[0-9]+" torch_major "${PEER_TORCH_CUDA}")
if(NOT torch_major EQUAL CUDAToolkit_VERSION_MAJOR)
  message(FATAL_ERROR "peer: torch ${PEER_TORCH_VERSION} has CUDA ${PEER_TORCH_CUDA}, but ${CMAKE_CUDA_COMPILER} is of CUDA ${toolkit}; "
                      "their major versions must be the same")
endif()

add_library(peer_cuda_kernels OBJECT ${PEER_CUDA_KERNELS})
target_include_directories(peer_cuda_kernels PRIVATE csrc)
set_target_properties(
  peer_cuda_kernels
  PROPERTIES CUDA_STANDARD 20
             CUDA_STANDARD_REQUIRED ON
             CUDA_EXTENSIONS OFF
             CUDA_VISIBILITY_PRESET hidden)
# Functions that are constexpr for the host, such as those of <limits>, may be called in kernels.
target_compile_options(peer_cuda_kernels PRIVATE --expt-relaxed-constexpr -Xcompiler=-Wall)

# The runtime is linked statically and kept to the library: Torch's own, whichever version it is, need not be found by the loader, and
# neither stands in for the other. Both work on the same contexts and streams. libcuda.so, the driver, is opened when it is first needed.
add_library(peer_torch_cuda INTERFACE IMPORTED)
target_link_libraries(peer_torch_cuda INTERFACE "${TORCH_DIR}/lib/libc10_cuda.so" CUDA::cudart_static)
target_include_directories(peer_torch_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
target_link_options(peer_torch_cuda INTERFACE LINKER:--exclude-libs,libcudart_static.a)

# "80-real;90" are the names sm_80, sm_90 and compute_90 in NVIDIA's own words: machine code, machine code, and PTX.
set(architectures "")
foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(architecture MATCHES "^([0-9]+[af]?)(-real|-virtual)?$")
    if(NOT CMAKE_MATCH_2 STREQUAL "-virtual")
      list(APPEND architectures "sm_${CMAKE_MATCH_1}")
    endif()
    if(NOT CMAKE_MATCH_2 STREQUAL "-real")
      list(APPEND architectures "compute_${CMAKE_MATCH_1}")
    endif()
  else()
    list(APPEND architectures "${architecture}")
  endif()
endforeach()
list(JOIN architectures "\", \"" architectures)
set(PEER_CUDA_INFO "{\"toolkit\": \"${toolkit}\", \"architectures\": [\"${architectures}\"]}")
