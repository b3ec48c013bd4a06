// No include guard: compiled once per instruction set, inside that file's unnamed namespace, after elementwise_body.h
// and a struct `Lanes`:
//   Vector                                     16 floats, partial sums of one output: lane j, columns k = j mod 16
//   load_weights(p), load_weights_tail(p, n)   16 weights as floats; the first n of them and zeros
//   add_product(sum, a, b)                     sum + a * b, each rounded
//   tree_sum(v)                                halves added: lanes 8 apart, then 4, 2 and 1
//   kTokens                                    tokens that share a load of 4 rows of weights
// A column that is not there adds 0 * 0, which changes no sum but -0, and no sum that started from 0 is -0.

inline void store_output(const PanelOutput& output, int64_t m, int64_t n, float sum) {
  const float scaled = sum * output.row_scale[n];
  const float value = output.bias == nullptr ? scaled : scaled + output.bias[n];
  const int64_t at = m * output.ld + n;
  switch (output.type) {
    case ElementType::kFloat32: static_cast<float*>(output.y)[at] = value; return;
    case ElementType::kBFloat16:
      static_cast<uint16_t*>(output.y)[at] = float_to_bfloat16(value);
      return;
    case ElementType::kFloat16:
      static_cast<uint16_t*>(output.y)[at] = float_to_float16(value);
      return;
  }
}

// Weights as they rest: converted in registers, for few tokens.
struct Int8Rows {
  const int8_t* data;
  int64_t ld, cols;
  Lanes::Vector load(int row, int64_t k) const {
    const int8_t* p = data + row * ld + k;
    __builtin_prefetch(p + 512);  // weights from memory
    return Lanes::load_weights(p);
  }
  Lanes::Vector load_tail(int row, int64_t k) const {
    return Lanes::load_weights_tail(data + row * ld + k, cols - k);
  }
};

// Weights converted once, with zeros behind the columns.
struct FloatRows {
  const float* data;
  int64_t ld, cols;
  Lanes::Vector load(int row, int64_t k) const { return Lanes::load(data + row * ld + k); }
  Lanes::Vector load_tail(int row, int64_t k) const { return load(row, k); }
};

template <int kRows, int kTokens, typename Rows>
inline void weight_only_block(const Rows& rows, const float* x, int64_t n, int64_t m,
                              const PanelOutput& output) {
  const int64_t stride = weight_only_cols(rows.cols), last = rows.cols / 16 * 16;
  Lanes::Vector sums[kRows * kTokens];
  unroll<kRows * kTokens>([&](auto i) DCEXT_LAMBDA { sums[i] = Lanes::zero(); });
  x += m * stride;
  const auto multiply_step = [&](int64_t k, auto is_tail) DCEXT_LAMBDA {
    Lanes::Vector activations[kTokens];
    unroll<kTokens>([&](auto t) DCEXT_LAMBDA { activations[t] = Lanes::load(x + t * stride + k); });
    unroll<kRows>([&](auto r) DCEXT_LAMBDA {
      const Lanes::Vector weights = is_tail ? rows.load_tail(r, k) : rows.load(r, k);
      unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
        sums[r * kTokens + t] = Lanes::add_product(sums[r * kTokens + t], weights, activations[t]);
      });
    });
  };
  for (int64_t k = 0; k < last; k += 16) multiply_step(k, std::false_type{});
  if (last < rows.cols) multiply_step(last, std::true_type{});
  unroll<kRows>([&](auto r) DCEXT_LAMBDA {
    unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
      store_output(output, m + t, n + r, Lanes::tree_sum(sums[r * kTokens + t]));
    });
  });
}

template <int kRows, typename Rows>
inline void weight_only_rows(const Rows& rows, const float* x, int64_t n, int64_t begin,
                             int64_t end, const PanelOutput& output) {
  int64_t m = begin;
  for (; m + Lanes::kTokens <= end; m += Lanes::kTokens) {
    weight_only_block<kRows, Lanes::kTokens>(rows, x, n, m, output);
  }
  if constexpr (Lanes::kTokens > 2) {
    for (; m + 2 <= end; m += 2) weight_only_block<kRows, 2>(rows, x, n, m, output);
  }
  for (; m < end; ++m) weight_only_block<kRows, 1>(rows, x, n, m, output);
}

inline void convert_row(const int8_t* weights, int64_t cols, float* out) {
  int64_t k = 0;
  for (; k + 16 <= cols; k += 16) Lanes::store(out + k, Lanes::load_weights(weights + k));
  if (k < cols) Lanes::store(out + k, Lanes::load_weights_tail(weights + k, cols - k));
}

void multiply_weight_only(const WeightPanel& panel, const float* x, int64_t tokens, float* scratch,
                          const PanelOutput& output) {
  constexpr int64_t kFewTokens = 2 * Lanes::kTokens;  // converting again costs less than storing
  constexpr int64_t kTokenBlock = 32;  // 512 KiB of 4096 columns: they stay in the L2 cache
  const int64_t stride = weight_only_cols(panel.cols);
  for (int64_t begin = 0; begin < tokens; begin += kTokenBlock) {
    const int64_t end = smaller(tokens, begin + kTokenBlock);
    for (int64_t n = 0; n < panel.rows;) {
      const int rows = n + kWeightOnlyRows <= panel.rows ? int{kWeightOnlyRows} : 1;
      const int8_t* weights = panel.data + n * panel.ld;
      const Int8Rows int8_rows{weights, panel.ld, panel.cols};
      const FloatRows float_rows{scratch, stride, panel.cols};
      if (tokens <= kFewTokens) {
        if (rows == 1) {
          weight_only_rows<1>(int8_rows, x, n, begin, end, output);
        } else {
          weight_only_rows<kWeightOnlyRows>(int8_rows, x, n, begin, end, output);
        }
      } else {
        for (int r = 0; r < rows; ++r)
          convert_row(weights + r * panel.ld, panel.cols, scratch + r * stride);
        if (rows == 1) {
          weight_only_rows<1>(float_rows, x, n, begin, end, output);
        } else {
          weight_only_rows<kWeightOnlyRows>(float_rows, x, n, begin, end, output);
        }
      }
      n += rows;
    }
  }
}
