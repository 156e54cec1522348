# The CUDA kernels and what the library needs besides them. Included if PEER_CUDA is on, after TorchWithoutCuda.cmake.
#
# In:   CMAKE_CUDA_ARCHITECTURES   the GPUs to compile for, required
# Out:  peer_cuda_kernels          object library
#       peer_torch_cuda            imported target: Torch's streams and memory, and the CUDA runtime that launches the kernels
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

# FindCUDAToolkit finds nvcc in more places than enable_language(CUDA) does, so nvcc need not be on PATH.
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
# Lets kernels call host functions that are constexpr, such as those of <limits>.
target_compile_options(peer_cuda_kernels PRIVATE --expt-relaxed-constexpr -Xcompiler=-Wall)

# The CUDA runtime is linked statically and its symbols are hidden. So the loader need not find Torch's runtime, whichever version it is, and
# neither runtime replaces the other. Both use the same contexts and streams. The driver, libcuda.so, is opened on first use.
add_library(peer_torch_cuda INTERFACE IMPORTED)
target_link_libraries(peer_torch_cuda INTERFACE "${TORCH_DIR}/lib/libc10_cuda.so" CUDA::cudart_static)
target_include_directories(peer_torch_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
target_link_options(peer_torch_cuda INTERFACE LINKER:--exclude-libs,libcudart_static.a)

# CMake's "80-real;90" means sm_80, sm_90 and compute_90 in NVIDIA's terms: machine code, machine code, and PTX.
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
