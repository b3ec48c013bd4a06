#include "gemm/kernel_table.h"

namespace dcext {
namespace {

/** A row is used where at least `required` and as many tokens are asked for. Best first, the last takes all. */
struct TableRow {
  Isa required;
  int64_t fewest_tokens;
  const GemmKernels* kernels;
};

#if defined(__x86_64__)
// A tile holds 16 tokens. With one or two it is mostly padding, and AVX-512 was faster for long rows (K = 4096: 2.6
// against 3.1 us per panel of 64 rows in the L2 cache with 2 tokens, 3.8 against 3.3 with 3).
constexpr int64_t kFewestAmxTokens = 3;
#endif

constexpr TableRow kTable[] = {
#if defined(__x86_64__)
    {Isa::kAmx, kFewestAmxTokens, &kAmxKernels}, {Isa::kAvx512Vnni, 1, &kAvx512Kernels},
    {Isa::kAvxVnni, 1, &kAvxVnniKernels},        {Isa::kAvx2, 1, &kAvx2Kernels},
#endif
    {Isa::kScalar, 1, &kScalarKernels},
};

}  // namespace

const GemmKernels& gemm_kernels(Isa isa, int64_t tokens) {
  for (const TableRow& row : kTable) {
    if (row.required <= isa && row.fewest_tokens <= tokens) return *row.kernels;
  }
  return kScalarKernels;
}

}  // namespace dcext
