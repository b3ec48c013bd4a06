// No include guard: compiled once per instruction set, inside that file's unnamed namespace, after unroll_body.h and a
// struct `Dot`:
//   Weights, Activations, Acc    vector types; kStep weights per vector
//   Packed                       element of the packed activations: q + kOffset
//   kRows, kTokens               the block of accumulators that the registers hold
//   load(p), load_tail(p, n)     kStep weights; the first n of them and zeros
//   dot(acc, x, w)               acc + x * w, in int32 lanes
//   sum_lanes<N>(acc, out)       out[i] = sum of the lanes of acc[i], i < N; N is kRows or 1
//
// Weights stay row-major: a vector holds kStep consecutive weights of one row, an accumulator the partial sums of one
// (row, token) pair, and lanes are added at the end. Unsigned activations (VNNI) carry an offset of 128; 128 times the
// sum of the row's weights takes it back. That sum is the product with one more token, of ones.

constexpr int64_t kTokenBlock = 96;     // 384 KiB of 4096 columns: they stay in the L2 cache
constexpr int64_t kColumnBlock = 4096;  // 8 rows, 32 KiB, stay in the L1 cache from token to token
constexpr int64_t kShortRow = 8 * Dot::kStep;  // below, lanes are added for kRows rows at a time

// Bytes ahead. Weights from memory, one row after the other and kRows at a time; more was slower.
constexpr int64_t kPrefetchVector = 1536, kPrefetchRow = 512;
constexpr int64_t kPrefetchPacked = 512 / sizeof(Dot::Packed);  // activations from the L2 cache

// Rows of a power of two would compete for one set of the L1 cache with the rows of weights.
inline int64_t dot_stride(int64_t cols) {
  const int64_t steps = (cols + Dot::kStep - 1) / Dot::kStep * Dot::kStep;
  return steps * static_cast<int64_t>(sizeof(Dot::Packed)) % 1024 == 0 ? steps + 64 : steps;
}

int64_t dot_packed_nbytes(int64_t tokens, int64_t cols) {
  const int64_t nbytes = tokens * dot_stride(cols) * static_cast<int64_t>(sizeof(Dot::Packed));
  return (nbytes + 63) / 64 * 64;
}

void dot_pack(const int8_t* q, int64_t ld, int64_t, int64_t cols, int64_t begin, int64_t end,
              uint8_t* packed) {
  const int64_t stride = dot_stride(cols);
  auto* out = reinterpret_cast<Dot::Packed*>(packed);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t k = 0; k < cols; ++k) {
      out[m * stride + k] = static_cast<Dot::Packed>(q[m * ld + k] + Dot::kOffset);
    }
    for (int64_t k = cols; k < stride; ++k) out[m * stride + k] = 0;
  }
}

// Where the products of kRows rows from row n on begin.
struct DotRows {
  const int8_t* weights;
  int64_t ld;
  int32_t* acc;  // of the first token
  int64_t acc_ld;
};

// One slab of columns: [begin, end) of the packed tokens at `x`. Sums of slabs but the first are added to `acc`.
struct DotSlab {
  const Dot::Packed* x;
  int64_t stride, begin, end;
};

// sum + product - kOffset * row_sum. Products of unsigned activations may wrap around beyond K = 2^16; this does not.
inline int32_t add_product(int32_t sum, int32_t product, int32_t row_sum) {
  return static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(product) -
                              static_cast<uint32_t>(Dot::kOffset) * static_cast<uint32_t>(row_sum));
}

// Products of kRows rows with kTokens tokens from token m on. kFirst: these are the first of the rows, and where
// activations have an offset, `row_sums` receives the sum of the weights of each row; otherwise it is used.
template <int kRows, int kTokens, bool kFirst>
inline DCEXT_ALWAYS_INLINE void dot_block(const DotRows& rows, const DotSlab& slab, int64_t m,
                                          int32_t* row_sums) {
  constexpr bool kOnes = kFirst && Dot::kOffset != 0;
  constexpr int kColumns = kTokens + (kOnes ? 1 : 0);
  Dot::Acc sums[kColumns * kRows];
  unroll<kColumns * kRows>([&](auto i) DCEXT_LAMBDA { sums[i] = Dot::zero(); });
  const int8_t* w = rows.weights;
  const Dot::Packed* x = slab.x + m * slab.stride;
  const int64_t last = slab.begin + (slab.end - slab.begin) / Dot::kStep * Dot::kStep;

  const auto multiply_step = [&](int64_t k, auto is_tail) DCEXT_LAMBDA {
    Dot::Activations activations[kColumns];
    unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
      activations[t] = Dot::load_packed(x + t * slab.stride + k);
      if constexpr (!kFirst) __builtin_prefetch(x + t * slab.stride + k + kPrefetchPacked);
    });
    if constexpr (kOnes) activations[kTokens] = Dot::ones();
    unroll<kRows>([&](auto r) DCEXT_LAMBDA {
      const int8_t* p = w + r * rows.ld + k;
      const Dot::Weights weights = is_tail ? Dot::load_tail(p, slab.end - k) : Dot::load(p);
      unroll<kColumns>([&](auto t) DCEXT_LAMBDA {
        sums[t * kRows + r] = Dot::dot(sums[t * kRows + r], activations[t], weights);
      });
      if constexpr (kFirst) __builtin_prefetch(p + kPrefetchRow);
    });
  };
  for (int64_t k = slab.begin; k < last; k += Dot::kStep) multiply_step(k, std::false_type{});
  if (last < slab.end) multiply_step(last, std::true_type{});

  if constexpr (kOnes) {
    Dot::template sum_lanes<kRows>(sums + kTokens * kRows, row_sums);
  }
  unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
    int32_t products[kRows];
    Dot::template sum_lanes<kRows>(sums + t * kRows, products);
    int32_t* out = rows.acc + (m + t) * rows.acc_ld;
    if (slab.begin == 0) {
      for (int r = 0; r < kRows; ++r) out[r] = add_product(0, products[r], row_sums[r]);
    } else {
      for (int r = 0; r < kRows; ++r) out[r] = add_product(out[r], products[r], row_sums[r]);
    }
  });
}

template <int kRows>
inline void dot_rows(const DotRows& rows, const DotSlab& slab, int64_t tokens) {
  constexpr int kFirstTokens = Dot::kOffset != 0 ? Dot::kTokens - 1 : Dot::kTokens;
  static_assert(Dot::kTokens == 2 || Dot::kTokens == 3, "remainders below");
  int32_t row_sums[kRows] = {};
  int64_t m = smaller(kFirstTokens, tokens);
  if (m == kFirstTokens) {
    dot_block<kRows, kFirstTokens, true>(rows, slab, 0, row_sums);
  } else {
    dot_block<kRows, 1, true>(rows, slab, 0, row_sums);
  }
  for (; m + Dot::kTokens <= tokens; m += Dot::kTokens) {
    dot_block<kRows, Dot::kTokens, false>(rows, slab, m, row_sums);
  }
  if (tokens - m == 2) dot_block<kRows, 2, false>(rows, slab, m, row_sums);
  if (tokens - m == 1) dot_block<kRows, 1, false>(rows, slab, m, row_sums);
}

// One token, long rows, weights from memory: one row after the other is one sequential stream.
void dot_vector(const WeightPanel& panel, const Dot::Packed* x, int32_t* acc) {
  constexpr int kUnroll = 4;
  constexpr bool kOnes = Dot::kOffset != 0;
  for (int64_t n = 0; n < panel.rows; ++n) {
    const int8_t* w = panel.data + n * panel.ld;
    Dot::Acc products[kUnroll], ones[kUnroll];
    unroll<kUnroll>([&](auto i) DCEXT_LAMBDA { products[i] = ones[i] = Dot::zero(); });
    int64_t k = 0;
    for (; k + kUnroll * Dot::kStep <= panel.cols; k += kUnroll * Dot::kStep) {
      unroll<kUnroll>([&](auto i) DCEXT_LAMBDA {
        const Dot::Weights weights = Dot::load(w + k + i * Dot::kStep);
        products[i] = Dot::dot(products[i], Dot::load_packed(x + k + i * Dot::kStep), weights);
        if constexpr (kOnes) ones[i] = Dot::dot(ones[i], Dot::ones(), weights);
        if (i * Dot::kStep % 64 == 0) __builtin_prefetch(w + k + i * Dot::kStep + kPrefetchVector);
      });
    }
    for (; k < panel.cols; k += Dot::kStep) {
      const int64_t left = panel.cols - k;
      const Dot::Weights weights =
          left >= Dot::kStep ? Dot::load(w + k) : Dot::load_tail(w + k, left);
      products[0] = Dot::dot(products[0], Dot::load_packed(x + k), weights);
      if constexpr (kOnes) ones[0] = Dot::dot(ones[0], Dot::ones(), weights);
    }
    const Dot::Acc total =
        Dot::add(Dot::add(products[0], products[1]), Dot::add(products[2], products[3]));
    int32_t product, row_sum = 0;
    Dot::sum_lanes<1>(&total, &product);
    if constexpr (kOnes) {
      const Dot::Acc total_ones = Dot::add(Dot::add(ones[0], ones[1]), Dot::add(ones[2], ones[3]));
      Dot::sum_lanes<1>(&total_ones, &row_sum);
    }
    acc[n] = add_product(0, product, row_sum);
  }
}

void dot_multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc) {
  const auto* x = reinterpret_cast<const Dot::Packed*>(packed);
  if (tokens == 1 && panel.cols >= kShortRow) return dot_vector(panel, x, acc);
  const int64_t stride = dot_stride(panel.cols);
  const int64_t slabs = (panel.cols + kColumnBlock - 1) / kColumnBlock;
  const int64_t slab_cols = ((panel.cols + slabs - 1) / slabs + 63) / 64 * 64;
  for (int64_t m = 0; m < tokens; m += kTokenBlock) {
    const int64_t count = smaller(kTokenBlock, tokens - m);
    for (int64_t n = 0; n < panel.rows;) {
      const bool full = n + Dot::kRows <= panel.rows;
      const int64_t done = n + (full ? Dot::kRows : 1);
      const DotRows rows{panel.data + n * panel.ld, panel.ld, acc + m * panel.rows + n, panel.rows};
      for (int64_t begin = 0; begin < panel.cols; begin += slab_cols) {
        const DotSlab slab{x + m * stride, stride, begin, smaller(begin + slab_cols, panel.cols)};
        if (full) {
          dot_rows<Dot::kRows>(rows, slab, count);
        } else {
          dot_rows<1>(rows, slab, count);
        }
      }
      n = done;
    }
  }
}
