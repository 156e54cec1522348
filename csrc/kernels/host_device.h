// Marks arithmetic that CPU and CUDA kernels share: nvcc compiles it for both.
#pragma once

#ifdef __CUDACC__
#define PEER_HOST_DEVICE __host__ __device__
#else
#define PEER_HOST_DEVICE
#endif
