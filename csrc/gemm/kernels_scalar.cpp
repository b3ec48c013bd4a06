// No vector intrinsics: what every machine runs, and what the other kernels are tested against.

#include <cstring>

#include "gemm/kernel_table.h"

namespace dcext {
namespace {

#include "gemm/elementwise_body.h"

int64_t packed_nbytes(int64_t tokens, int64_t cols) { return (tokens * cols + 63) / 64 * 64; }

void pack(const int8_t* q, int64_t, int64_t cols, int64_t begin, int64_t end, uint8_t* packed) {
  std::memcpy(packed + begin * cols, q + begin * cols, static_cast<size_t>((end - begin) * cols));
}

void multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc) {
  const auto* x = reinterpret_cast<const int8_t*>(packed);
  for (int64_t n = 0; n < panel.rows; ++n) {
    const int8_t* w = panel.data + n * panel.ld;
    for (int64_t m = 0; m < tokens; ++m) {
      int32_t sum = 0;
      for (int64_t k = 0; k < panel.cols; ++k) {
        sum += int32_t{w[k]} * int32_t{x[m * panel.cols + k]};
      }
      acc[m * panel.rows + n] = sum;
    }
  }
}

}  // namespace

extern const GemmKernels kScalarKernels = {Isa::kScalar,  quantize,   packed_nbytes,        pack,
                                           multiply,      dequantize, multiply_weight_only, widen,
                                           dequantize_row};

}  // namespace dcext
