// AVX-512 VNNI: vpdpbusd multiplies 64 unsigned activations (q + 128) with 64 signed weights into 16 int32 lanes.
// Registers: 8 rows x 3 tokens of accumulators = 24, 3 of activations, 1 of weights. Limited by the two VNNI ports for
// many tokens (325 of 430 GMAC/s, panel in the L2 cache), by memory for one (17.0 GB/s where a plain read reaches 18.3).

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <utility>

#define DCEXT_TARGET "avx2,fma,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#include "base/target_pragmas.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

DCEXT_TARGET_BEGIN

namespace dcext {
namespace {

#include "base/unroll_body.h"

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
  // Not _mm512_dpbusd_epi32: around it GCC 12 moves and spills most of the accumulators in every step.
  static Acc dot(Acc acc, Activations x, Weights w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    return acc;
  }

  template <int kCount>
  static void sum_lanes(const Acc* acc, int32_t* out) {
    static_assert(kCount == 8 || kCount == 1, "other counts are not used");
    if constexpr (kCount == 8) {
      const __m512i a = combine(acc[0], acc[1], acc[2], acc[3]);
      const __m512i b = combine(acc[4], acc[5], acc[6], acc[7]);
      const __m256i a2 = add_halves(a), b2 = add_halves(b);
      const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(a2, b2, 0x20),
                                            _mm256_permute2x128_si256(a2, b2, 0x31));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sums);
    } else {
      // Not _mm512_reduce_add_epi32: it ends in a signed addition, and sums with offsets may wrap around.
      const __m256i eight = add_halves(acc[0]);
      __m128i sum =
          _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
      sum = _mm_hadd_epi32(sum, sum);
      sum = _mm_hadd_epi32(sum, sum);
      out[0] = _mm_cvtsi128_si32(sum);
    }
  }

 private:
  // Element i of each 128-bit part: that part's share of the sum of argument i.
  static __m512i combine(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  static __m256i add_halves(__m512i v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }
};

struct Lanes {
  static constexpr int kTokens = 4;  // 4 rows x 4 tokens: 16 of 32 registers
  using Vector = __m512;

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector load_weights(const int8_t* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Vector load_weights_tail(const int8_t* p, int64_t n) {
    return widen(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p));
  }
  static Vector add_product(Vector sum, Vector a, Vector b) {
    return _mm512_add_ps(sum, _mm512_mul_ps(a, b));
  }
  static float tree_sum(Vector v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }

 private:
  static Vector widen(__m128i w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(w)); }
};

struct PackedDot {
  using Acc = __m512i;
  using Weights = __m512i;
  static constexpr int64_t kRows = 16;
  static constexpr uint32_t kOffset = 128;
  static constexpr int kMostTokens = 8, kDenseTokens = 12;

  template <int kWidth>
  struct Lookup {
    static constexpr int kTables = kWidth <= 4 ? 1 : 1 << (kWidth - 4);
    __m512i tables[kTables];

    explicit Lookup(const int8_t* table) {
      unroll<kTables>([&](auto i) DCEXT_LAMBDA {
        const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i));
        const __m128i shifted = _mm_xor_si128(part, _mm_set1_epi8(static_cast<char>(kOffset)));
        tables[i] = _mm512_broadcast_i32x4(shifted);
      });
    }

    template <int kVector>
    DCEXT_ALWAYS_INLINE __m512i weights(const uint8_t* group) const {
      if constexpr (kWidth < 4) {
        return _mm512_shuffle_epi8(tables[0], short_code<kVector>(group));
      } else {
        const __m512i low = bits<kVector / 4 * 4, 0, 15>(load(group, kVector % 4));
        const __m512i first = _mm512_shuffle_epi8(tables[0], low);
        if constexpr (kWidth == 4) {
          return first;
        } else if constexpr (kWidth == 5) {
          const __mmask64 bit = test<kVector>(load(group, 4));
          return _mm512_mask_shuffle_epi8(first, bit, tables[1], low);
        } else {
          const __m512i high = load(group, 4 + kVector % 2);
          const __mmask64 bit4 = test<kVector / 2 * 2>(high),
                          bit5 = test<kVector / 2 * 2 + 1>(high);
          const __m512i even = _mm512_mask_shuffle_epi8(first, bit5, tables[2], low);
          const __m512i odd =
              _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(tables[1], low), bit5, tables[3], low);
          return _mm512_mask_mov_epi8(even, bit4, odd);
        }
      }
    }

   private:
    static __m512i load(const uint8_t* group, int piece) {
      return _mm512_loadu_si512(group + 64 * piece);
    }
    // Moves bit kFrom of every byte to bit kTo, keeping those of kMask.
    template <int kFrom, int kTo, int kMask>
    static __m512i bits(__m512i v) {
      if constexpr (kFrom > kTo) v = _mm512_srli_epi16(v, kFrom - kTo);
      if constexpr (kFrom < kTo) v = _mm512_slli_epi16(v, kTo - kFrom);
      return _mm512_and_si512(v, _mm512_set1_epi8(kMask));
    }
    template <int kBit>
    static __mmask64 test(__m512i v) {
      return _mm512_test_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(1 << kBit)));
    }
    template <int kVector>
    static __m512i short_code(const uint8_t* group) {
      const __m512i two = bits<kVector / 2 * 2, 0, 3>(load(group, kVector % 2));
      if constexpr (kWidth == 2) return two;
      return _mm512_or_si512(two, bits<kVector, 2, 4>(load(group, 2)));
    }
  };

  static Acc zero() { return _mm512_setzero_si512(); }
  static Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static Acc fill(int32_t i) { return _mm512_set1_epi32(i); }
  static void store(int32_t* p, Acc acc) { _mm512_storeu_si512(p, acc); }
  static Acc load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_weights(uint8_t* p, Weights w) { _mm512_store_si512(p, w); }
  static Weights load_weights(const uint8_t* p) { return _mm512_load_si512(p); }
  static Acc dot(Acc acc, Weights w, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof(quad));
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(_mm512_set1_epi32(quad)));
    return acc;
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

const dcext::GemmKernels dcext::kAvx512Kernels =
    table_of(Isa::kAvx512Vnni, dot_packed_nbytes, dot_pack, dot_multiply, dcext::kAnyTokens);

const dcext::GemmKernels dcext::kAmxKernels =
    table_of(Isa::kAmx, amx_packed_nbytes, amx_pack, amx_multiply, dcext::kFewTokens);

#endif  // __x86_64__
