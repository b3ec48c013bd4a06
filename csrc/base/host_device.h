#pragma once

// Functions that kernels and the CPU share. Files that use it compile with and without nvcc.
#if defined(__CUDACC__)
#define DCEXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DCEXT_HOST_DEVICE inline
#endif
