// AVX-512 VNNI: vpdpbusd multiplies 64 unsigned activations (q + 128) with 64 signed weights into 16 int32 lanes.
// Registers: 8 rows x 3 tokens of accumulators = 24, 7 left for weights and activations. Limited by the two VNNI ports
// for many tokens, by memory for one.

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>

#include "gemm/target_pragmas.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, in its own intrinsics
#endif

DCEXT_TARGET_BEGIN("avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace dcext {
namespace {

struct Dot {
  using Weights = __m512i;
  using Activations = __m512i;
  using Acc = __m512i;
  using Packed = uint8_t;
  static constexpr int kStep = 64, kOffset = 128, kRows = 8, kTokens = 3;

  static Acc zero() { return _mm512_setzero_si512(); }
  static Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static Activations ones() { return _mm512_set1_epi8(1); }
  static Weights load(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Weights load_tail(const int8_t* p, int64_t n) {
    return _mm512_maskz_loadu_epi8((~0ull) >> (64 - n), p);
  }
  static Activations load_packed(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Acc dot(Acc acc, Activations x, Weights w) { return _mm512_dpbusd_epi32(acc, x, w); }

  // Halves of two accumulators become one, until each 128-bit lane, then each element, holds one sum.
  template <int kCount>
  static void reduce(const Acc* acc, int32_t* out) {
    if (kCount == 8) {
      const __m512i a = combine(acc[0], acc[1], acc[2], acc[3]);
      const __m512i b = combine(acc[4], acc[5], acc[6], acc[7]);
      // Lanes of a: sums 0..3, spread over four 128-bit parts. Add the parts of both.
      const __m512i low = _mm512_shuffle_i64x2(a, b, 0x44), high = _mm512_shuffle_i64x2(a, b, 0xee);
      const __m512i half = _mm512_add_epi32(low, high);  // a0+a2, a1+a3, b0+b2, b1+b3
      const __m512i swapped = _mm512_shuffle_i64x2(half, half, 0xb1);
      const __m512i sums = _mm512_add_epi32(half, swapped);  // a, a, b, b
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(sums));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm512_extracti32x4_epi32(sums, 2));
    } else {
      for (int i = 0; i < kCount; ++i) out[i] = _mm512_reduce_add_epi32(acc[i]);
    }
  }

 private:
  // Element i of each 128-bit part: that part's share of the sum of argument i.
  static __m512i combine(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
};

#include "gemm/dot_body.h"
#include "gemm/elementwise_body.h"

}  // namespace

extern const GemmKernels kAvx512Kernels = {
    Isa::kAvx512Vnni,     quantize, dot_packed_nbytes, dot_pack, dot_multiply, dequantize,
    multiply_weight_only, widen,    dequantize_row};

}  // namespace dcext

DCEXT_TARGET_END

#endif  // __x86_64__
