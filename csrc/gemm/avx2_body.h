// No include guard: included in the unnamed namespaces of the 256-bit kernels, which share what is not a product.

struct Avx2Sums {
  using Acc = __m256i;

  static Acc zero() { return _mm256_setzero_si256(); }
  static Acc add(Acc a, Acc b) { return _mm256_add_epi32(a, b); }

  template <int kCount>
  static void sum_lanes(const Acc* acc, int32_t* out) {
    static_assert(kCount == 4 || kCount == 1, "other counts are not used");
    if constexpr (kCount == 4) {
      const __m256i ab = _mm256_hadd_epi32(acc[0], acc[1]), cd = _mm256_hadd_epi32(acc[2], acc[3]);
      const __m256i halves = _mm256_hadd_epi32(ab, cd);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), add_halves(halves));
    } else {
      __m128i sum = add_halves(acc[0]);
      sum = _mm_hadd_epi32(sum, sum);
      sum = _mm_hadd_epi32(sum, sum);
      out[0] = _mm_cvtsi128_si32(sum);
    }
  }

  static __m128i add_halves(__m256i v) {
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
};

struct Lanes {
  static constexpr int kTokens = 1;  // 4 rows x 1 token: 8 of 16 registers
  struct Vector {
    __m256 low, high;
  };

  static Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, Vector v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
  }
  static Vector load_weights(const int8_t* p) {
    const __m128i w = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(w)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(w, w)))};
  }
  static Vector load_weights_tail(const int8_t* p, int64_t n) {
    int8_t tail[16] = {};
    std::memcpy(tail, p, static_cast<size_t>(n));
    return load_weights(tail);
  }
  static Vector add_product(Vector sum, Vector a, Vector b) {
    return {_mm256_add_ps(sum.low, _mm256_mul_ps(a.low, b.low)),
            _mm256_add_ps(sum.high, _mm256_mul_ps(a.high, b.high))};
  }
  static float tree_sum(Vector v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
};

// What packed products share: eight rows a vector, four tokens' sums beside what looking up takes of 16 registers.
template <uint32_t kAdded>
struct PackedAvx2 {
  using Acc = __m256i;
  using Weights = __m256i;
  static constexpr int64_t kRows = 8;
  static constexpr uint32_t kOffset = kAdded;
  static constexpr int kMostTokens = 4, kDenseTokens = 6;

  template <int kWidth>
  struct Lookup : LookupAvx2<kWidth> {
    explicit Lookup(const int8_t* table) : LookupAvx2<kWidth>(table, kAdded) {}
  };

  static Acc zero() { return _mm256_setzero_si256(); }
  static Acc add(Acc a, Acc b) { return _mm256_add_epi32(a, b); }
  static void store(int32_t* p, Acc acc) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), acc);
  }
  static Acc fill(int32_t i) { return _mm256_set1_epi32(i); }
  static Acc load(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_weights(uint8_t* p, Weights w) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), w);
  }
  static Weights load_weights(const uint8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m256i broadcast(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof(quad));
    return _mm256_set1_epi32(quad);
  }
};
