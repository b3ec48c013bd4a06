// AVX-VNNI (256 bits, VEX encoding): as AVX-512, half as wide, 16 registers: 4 rows x 3 tokens of accumulators.

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "gemm/target_pragmas.h"

DCEXT_TARGET_BEGIN("avx2,fma,bmi2,avxvnni")

namespace dcext {
namespace {

#include "gemm/dot_avx2_body.h"

struct Dot : Avx2Reduce {
  using Weights = __m256i;
  using Activations = __m256i;
  using Packed = uint8_t;
  static constexpr int kStep = 32, kOffset = 128, kRows = 4, kTokens = 3;

  static Activations ones() { return _mm256_set1_epi8(1); }
  static Weights load(const int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Weights load_tail(const int8_t* p, int64_t n) {
    alignas(32) int8_t tail[kStep] = {};
    std::memcpy(tail, p, static_cast<size_t>(n));
    return load(tail);
  }
  static Activations load_packed(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Acc dot(Acc acc, Activations x, Weights w) { return _mm256_dpbusd_avx_epi32(acc, x, w); }
};

#include "gemm/dot_body.h"
#include "gemm/elementwise_body.h"

}  // namespace

extern const GemmKernels kAvxVnniKernels = {
    Isa::kAvxVnni,        quantize, dot_packed_nbytes, dot_pack, dot_multiply, dequantize,
    multiply_weight_only, widen,    dequantize_row};

}  // namespace dcext

DCEXT_TARGET_END

#endif  // __x86_64__
