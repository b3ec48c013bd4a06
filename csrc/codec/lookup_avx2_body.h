// No include guard: included in unnamed namespaces of files compiled for AVX2, behind unroll_body.h.

// The weights of a packed group, as vectors: vector v holds columns 4v .. 4v + 3 of eight rows.
template <int kWidth>
struct LookupAvx2 {
  static constexpr int kTables = kWidth <= 4 ? 1 : 1 << (kWidth - 4);
  __m256i tables[kTables];

  // Weights come out xor `flip`: 0, or 0x80 to make w + 128 of them.
  LookupAvx2(const int8_t* table, uint8_t flip) {
    unroll<kTables>([&](auto i) DCEXT_LAMBDA {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * i));
      tables[i] =
          _mm256_broadcastsi128_si256(_mm_xor_si128(part, _mm_set1_epi8(static_cast<char>(flip))));
    });
  }

  // `group` may point 32 bytes into the first piece, for the last eight rows.
  template <int kVector>
  DCEXT_ALWAYS_INLINE __m256i weights(const uint8_t* group) const {
    if constexpr (kWidth < 4) {
      return _mm256_shuffle_epi8(tables[0], short_code<kVector>(group));
    } else {
      const __m256i low = bits<kVector / 4 * 4, 0, 15>(load(group, kVector % 4));
      if constexpr (kWidth == 4) {
        return _mm256_shuffle_epi8(tables[0], low);
      } else if constexpr (kWidth == 5) {
        return pick<kVector>(load(group, 4), low, 0);
      } else {
        const __m256i high = load(group, 4 + kVector % 2);
        constexpr int kBit = kVector / 2 * 2;
        return _mm256_blendv_epi8(pick<kBit>(high, low, 0), pick<kBit>(high, low, 2),
                                  to_top<kBit + 1>(high));
      }
    }
  }

 private:
  static __m256i load(const uint8_t* group, int piece) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 * piece));
  }
  // Moves bit kFrom of every byte to bit kTo, keeping those of `kMask`.
  template <int kFrom, int kTo, int kMask>
  static __m256i bits(__m256i v) {
    if constexpr (kFrom > kTo) v = _mm256_srli_epi16(v, kFrom - kTo);
    if constexpr (kFrom < kTo) v = _mm256_slli_epi16(v, kTo - kFrom);
    return _mm256_and_si256(v, _mm256_set1_epi8(kMask));
  }
  template <int kBit>
  static __m256i to_top(__m256i v) {
    return _mm256_slli_epi16(v, 7 - kBit);
  }
  template <int kVector>
  static __m256i short_code(const uint8_t* group) {
    const __m256i two = bits<kVector / 2 * 2, 0, 3>(load(group, kVector % 2));
    if constexpr (kWidth == 2) return two;
    return _mm256_or_si256(two, bits<kVector, 2, 4>(load(group, 2)));
  }
  // tables[first] or tables[first + 1] at `low`, by bit kBit of `high`.
  template <int kBit>
  __m256i pick(__m256i high, __m256i low, int first) const {
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(tables[first], low),
                              _mm256_shuffle_epi8(tables[first + 1], low), to_top<kBit>(high));
  }
};
