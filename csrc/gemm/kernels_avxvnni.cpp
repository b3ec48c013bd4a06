// AVX-VNNI (256 bits, VEX encoding): as AVX-512, half as wide, 16 registers: 4 rows x 3 tokens of accumulators.

#include "gemm/kernel_table.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstring>
#include <utility>

#define DCEXT_TARGET "avx2,fma,bmi2,avxvnni"
#include "base/target_pragmas.h"

DCEXT_TARGET_BEGIN

namespace dcext {
namespace {

#include "base/unroll_body.h"
#include "codec/lookup_avx2_body.h"
#include "gemm/avx2_body.h"

struct Dot : Avx2Sums {
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
  // Not _mm256_dpbusd_avx_epi32: see kernels_avx512.cpp.
  static Acc dot(Acc acc, Activations x, Weights w) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
    return acc;
  }
};

struct PackedDot : PackedAvx2<128> {
  static Acc dot(Acc acc, Weights w, const int8_t* x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(broadcast(x)));
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

const dcext::GemmKernels dcext::kAvxVnniKernels =
    table_of(Isa::kAvxVnni, dot_packed_nbytes, dot_pack, dot_multiply, dcext::kAnyTokens);

#endif  // __x86_64__
