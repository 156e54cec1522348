# The CUDA operators of libpeer.so on a machine without a GPU. The same operators and kernels are compiled as C++ against the stand-ins in
# include/ and run on the CPU. If PEER_EMULATE_CUDA is on, this file replaces cmake/Cuda.cmake, after TorchWithoutCuda.cmake.
#
# Out:  peer_cuda_kernels          objects
#       peer_torch_cuda            target: stand-ins for Torch's streams and memory
#       PEER_CUDA_INFO             how the kernels are built, as JSON

set(emulation "${PROJECT_SOURCE_DIR}/tests/emulated_cuda")
set_source_files_properties(${PEER_CUDA_KERNELS} PROPERTIES LANGUAGE CXX)
add_library(peer_cuda_kernels OBJECT ${PEER_CUDA_KERNELS} "${emulation}/grid_player.cpp")
target_include_directories(peer_cuda_kernels PRIVATE "${emulation}/include" csrc)
target_compile_options(peer_cuda_kernels PRIVATE -O2 -Wno-unknown-pragmas)

# Not an imported target, whose headers would be system headers: these must be found before Torch's own.
add_library(peer_torch_cuda INTERFACE)
target_include_directories(peer_torch_cuda INTERFACE "${emulation}/include")
target_sources(peer_torch_cuda INTERFACE "${emulation}/emulated_device.cpp")

set(PEER_CUDA_INFO "{\"toolkit\": \"emulated\", \"architectures\": []}")
