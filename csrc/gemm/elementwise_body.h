// No include guard: compiled once per instruction set, inside that file's unnamed namespace. Plain loops with
// independent iterations, which compilers vectorize; -ffp-contract=off keeps products and sums apart, so that every
// instruction set rounds alike.

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

constexpr uint32_t kAbsMask = 0x7fffffff, kInfinityBits = 0x7f800000;

inline float bfloat16_to_float(uint16_t value) { return as_float(uint32_t{value} << 16); }

// Round to nearest even; NaN stays a quiet NaN.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & kAbsMask) > kInfinityBits ? nan : rounded);
}

// All ones where a < b, for a and b below 2^31. Choices between floats are made with masks: GCC turns ?: into branches
// where one side is a float operation that might trap, and then vectorizes nothing.
inline uint32_t mask_less(uint32_t a, uint32_t b) { return 0u - ((a - b) >> 31); }
inline uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

// IEEE 754 binary16. A subnormal m 2^-24 is (2^-14 + m 2^-24) - 2^-14, without a float that is subnormal itself: exact
// even where a thread flushes those.
inline float float16_to_float(uint16_t value) {
  const uint32_t magnitude = uint32_t{value} & 0x7fff;
  const uint32_t subnormal = mask_less(magnitude, 0x400);
  const uint32_t shifted = (magnitude << 13) + 0x38000000 + (subnormal & 0x00800000);
  const uint32_t finite = as_bits(as_float(shifted) - as_float(subnormal & 0x38800000));
  const uint32_t special = mask_less(0x7bff, magnitude) & kInfinityBits;
  return as_float(finite | special | (uint32_t{value} & 0x8000) << 16);
}

inline uint16_t float_to_float16(float value) {
  const uint32_t bits = as_bits(value), magnitude = bits & kAbsMask;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal =
      as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // 2^-24 is the last bit of 0.5f
  const uint32_t finite = choose(mask_less(magnitude, 0x38800000), subnormal, normal);
  const uint32_t special = 0x7c00 | (mask_less(kInfinityBits, magnitude) & 0x200);
  // 65520 is the midpoint between the largest binary16 and the next: it rounds to infinity.
  const uint32_t result = choose(mask_less(magnitude, 0x477ff000), finite, special);
  return static_cast<uint16_t>(result | (bits >> 16 & 0x8000));
}

struct Float32 {
  using Storage = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};
struct BFloat16 {
  using Storage = uint16_t;
  static float load(uint16_t value) { return bfloat16_to_float(value); }
  static uint16_t store(float value) { return float_to_bfloat16(value); }
};
struct Float16 {
  using Storage = uint16_t;
  static float load(uint16_t value) { return float16_to_float(value); }
  static uint16_t store(float value) { return float_to_float16(value); }
};

template <typename Type>
void widen_as(const void* x, const float* col_scale, int64_t cols, float* out) {
  const auto* src = static_cast<const typename Type::Storage*>(x);
  if (col_scale == nullptr) {
    for (int64_t k = 0; k < cols; ++k) out[k] = Type::load(src[k]);
  } else {
    for (int64_t k = 0; k < cols; ++k) out[k] = Type::load(src[k]) * col_scale[k];
  }
  for (int64_t k = cols; k < weight_only_cols(cols); ++k) out[k] = 0.0f;
}

void widen(const void* x, ElementType type, const float* col_scale, int64_t cols, float* out) {
  switch (type) {
    case ElementType::kFloat32: return widen_as<Float32>(x, col_scale, cols, out);
    case ElementType::kBFloat16: return widen_as<BFloat16>(x, col_scale, cols, out);
    case ElementType::kFloat16: return widen_as<Float16>(x, col_scale, cols, out);
  }
}

template <typename Type>
void quantize_as(const void* x, const float* col_scale, int64_t cols, int8_t* q, float* scale) {
  // In blocks, so that the widened values stay in the L1 cache and no scratch is needed; they are widened twice.
  constexpr int64_t kBlock = 1024;
  float values[kBlock];
  const auto* src = static_cast<const typename Type::Storage*>(x);
  uint32_t max_bits = 0;  // |v| compares as an integer, and NaN above everything
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
    widen_as<Type>(src + begin, col_scale == nullptr ? nullptr : col_scale + begin, n, values);
    for (int64_t k = 0; k < n; ++k) {
      const uint32_t bits = as_bits(values[k]) & kAbsMask;
      max_bits = bits > max_bits ? bits : max_bits;
    }
  }
  if (max_bits == 0 || max_bits >= kInfinityBits) {
    *scale = max_bits == 0 ? 0.0f : as_float(0x7fc00000);
    std::memset(q, 0, static_cast<size_t>(cols));
    return;
  }
  const float max = as_float(max_bits);
  *scale = max / 127.0f;
  const float inverse =
      max < 1e-36f ? 0.0f : 127.0f / max;  // finite; such tokens are zero for any purpose
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t n = cols - begin < kBlock ? cols - begin : kBlock;
    widen_as<Type>(src + begin, col_scale == nullptr ? nullptr : col_scale + begin, n, values);
    for (int64_t k = 0; k < n; ++k) {
      // Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits; |v * inverse| <= 127.
      q[begin + k] = static_cast<int8_t>(as_bits(values[k] * inverse + 12582912.0f) - 0x4b400000u);
    }
  }
}

void quantize(const void* x, ElementType type, const float* col_scale, int64_t cols, int8_t* q,
              float* scale) {
  switch (type) {
    case ElementType::kFloat32: return quantize_as<Float32>(x, col_scale, cols, q, scale);
    case ElementType::kBFloat16: return quantize_as<BFloat16>(x, col_scale, cols, q, scale);
    case ElementType::kFloat16: return quantize_as<Float16>(x, col_scale, cols, q, scale);
  }
}

template <typename Type, typename Sum>
void dequantize_as(const Sum* acc, int64_t tokens, int64_t rows, const float* act_scale,
                   const PanelOutput& output) {
  auto* y = static_cast<typename Type::Storage*>(output.y);
  const float* row_scale = output.row_scale;
  const float* bias = output.bias;
  for (int64_t m = 0; m < tokens; ++m, y += output.ld, acc += rows) {
    const float scale = act_scale[m];
    if (bias == nullptr) {
      for (int64_t n = 0; n < rows; ++n) {
        y[n] = Type::store(static_cast<float>(acc[n]) * row_scale[n] * scale);
      }
    } else {
      for (int64_t n = 0; n < rows; ++n) {
        y[n] = Type::store(static_cast<float>(acc[n]) * row_scale[n] * scale + bias[n]);
      }
    }
  }
}

template <typename Sum>
void dequantize_sums(const Sum* acc, int64_t tokens, int64_t rows, const float* act_scale,
                     const PanelOutput& output) {
  switch (output.type) {
    case ElementType::kFloat32: return dequantize_as<Float32>(acc, tokens, rows, act_scale, output);
    case ElementType::kBFloat16:
      return dequantize_as<BFloat16>(acc, tokens, rows, act_scale, output);
    case ElementType::kFloat16: return dequantize_as<Float16>(acc, tokens, rows, act_scale, output);
  }
}

void dequantize(const int32_t* acc, int64_t tokens, int64_t rows, const float* act_scale,
                const PanelOutput& output) {
  dequantize_sums(acc, tokens, rows, act_scale, output);
}

void dequantize_wide(const int64_t* acc, int64_t tokens, int64_t rows, const float* act_scale,
                     const PanelOutput& output) {
  dequantize_sums(acc, tokens, rows, act_scale, output);
}

template <typename Type>
void dequantize_row_as(const int8_t* weight, int64_t cols, float row_scale, const float* col_scale,
                       void* out) {
  auto* y = static_cast<typename Type::Storage*>(out);
  if (col_scale == nullptr) {
    for (int64_t k = 0; k < cols; ++k) {
      y[k] = Type::store(static_cast<float>(weight[k]) * row_scale);
    }
  } else {
    for (int64_t k = 0; k < cols; ++k) {
      y[k] = Type::store(static_cast<float>(weight[k]) * row_scale * col_scale[k]);
    }
  }
}

void dequantize_row(const int8_t* weight, int64_t cols, float row_scale, const float* col_scale,
                    ElementType type, void* out) {
  switch (type) {
    case ElementType::kFloat32:
      return dequantize_row_as<Float32>(weight, cols, row_scale, col_scale, out);
    case ElementType::kBFloat16:
      return dequantize_row_as<BFloat16>(weight, cols, row_scale, col_scale, out);
    case ElementType::kFloat16:
      return dequantize_row_as<Float16>(weight, cols, row_scale, col_scale, out);
  }
}
