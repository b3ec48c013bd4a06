// No include guard: included in the unnamed namespaces of the 256-bit kernels. What their accumulators share.

struct Avx2Reduce {
  using Acc = __m256i;

  static Acc zero() { return _mm256_setzero_si256(); }
  static Acc add(Acc a, Acc b) { return _mm256_add_epi32(a, b); }

  template <int kCount>
  static void reduce(const Acc* acc, int32_t* out) {
    if (kCount == 4) {
      const __m256i ab = _mm256_hadd_epi32(acc[0], acc[1]), cd = _mm256_hadd_epi32(acc[2], acc[3]);
      const __m256i parts = _mm256_hadd_epi32(ab, cd);
      const __m128i sums =
          _mm_add_epi32(_mm256_castsi256_si128(parts), _mm256_extracti128_si256(parts, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sums);
      return;
    }
    for (int i = 0; i < kCount; ++i) {
      __m128i sum =
          _mm_add_epi32(_mm256_castsi256_si128(acc[i]), _mm256_extracti128_si256(acc[i], 1));
      sum = _mm_hadd_epi32(sum, sum);
      sum = _mm_hadd_epi32(sum, sum);
      out[i] = _mm_cvtsi128_si32(sum);
    }
  }
};
