#pragma once

#include "gemm/int8_gemm.h"

namespace dcext {

// One row per instruction set. Constants: nothing runs at load time. Rows for other architectures do not exist.
extern const GemmKernels kScalarKernels;
#if defined(__x86_64__)
extern const GemmKernels kAvx2Kernels;
extern const GemmKernels kAvxVnniKernels;
extern const GemmKernels kAvx512Kernels;
extern const GemmKernels kAmxKernels;  // the AVX-512 kernels with products of kernels_amx.cpp

// The members of GemmKernels of these names.
int64_t amx_packed_nbytes(int64_t tokens, int64_t cols);
void amx_pack(const int8_t* q, int64_t ld, int64_t tokens, int64_t cols, int64_t begin, int64_t end,
              uint8_t* packed);
void amx_multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc);
#endif

}  // namespace dcext
