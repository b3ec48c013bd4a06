#include "gemm/kernel_table.h"

namespace dcext {

const GemmKernels& gemm_kernels(Isa isa, int64_t tokens) {
#if defined(__x86_64__)
  // Below this many tokens a 16-token tile is mostly padding and AVX-512 is faster (bench/bench_layers.py).
  constexpr int64_t kFewestAmxTokens = 5;
  switch (isa) {
    case Isa::kScalar: return kScalarKernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kAvxVnni: return kAvxVnniKernels;
    case Isa::kAvx512Vnni: return kAvx512Kernels;
    case Isa::kAmx: return tokens < kFewestAmxTokens ? kAvx512Kernels : kAmxKernels;
  }
#endif
  static_cast<void>(isa);
  static_cast<void>(tokens);
  return kScalarKernels;
}

}  // namespace dcext
