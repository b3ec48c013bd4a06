#pragma once

#include "gemm/int8_gemm.h"

namespace dcext {

// One row per instruction set; each is defined in the file of its name. Rows for other architectures do not exist.
extern const GemmKernels kScalarKernels;
#if defined(__x86_64__)
extern const GemmKernels kAvx2Kernels;
extern const GemmKernels kAvxVnniKernels;
extern const GemmKernels kAvx512Kernels;
extern const GemmKernels kAmxKernels;
#endif

}  // namespace dcext
