// AVX2: weights and activations are widened to int16 and multiplied with vpmaddwd. (vpmaddubsw needs no widening, but
// saturates its sums of two products and is not exact.)

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <utility>

#define DCEXT_TARGET "avx2,fma,bmi2"
#include "base/target_pragmas.h"

DCEXT_TARGET_BEGIN

namespace dcext {
namespace {

#include "base/unroll_body.h"
#include "codec/lookup_avx2_body.h"
#include "gemm/avx2_body.h"

struct Dot : Avx2Sums {
  using Weights = __m256i;  // 16 int16
  using Activations = __m256i;
  using Packed = int16_t;
  static constexpr int kStep = 16, kOffset = 0, kRows = 4, kTokens = 2;

  static Activations ones() { return _mm256_set1_epi16(1); }
  static Weights load(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Weights load_tail(const int8_t* p, int64_t n) {
    alignas(16) int8_t tail[kStep] = {};
    std::memcpy(tail, p, static_cast<size_t>(n));
    return load(tail);
  }
  static Activations load_packed(const int16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Acc dot(Acc acc, Activations x, Weights w) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(x, w));
  }
};

struct PackedDot : PackedAvx2<0> {
  // |w| is at most 128 and |x| at most 127: sums of two products fit in int16, and nothing saturates.
  static Acc dot(Acc acc, Weights w, const int8_t* x) {
    const __m256i products =
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(broadcast(x), w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
};

#include "gemm/dot_body.h"
#include "gemm/elementwise_body.h"
#include "gemm/packed_body.h"
#include "gemm/weight_only_body.h"

}  // namespace
}  // namespace dcext

DCEXT_TARGET_END

#include "gemm/table_body.h"

const dcext::GemmKernels dcext::kAvx2Kernels =
    table_of(Isa::kAvx2, dot_packed_nbytes, dot_pack, dot_multiply, dcext::kAnyTokens);

#endif  // __x86_64__
