// No include guard: compiled once per instruction set, inside that file's unnamed namespace, after a struct `Dot`:
//   Weights / Acc       vector types; kStep weights per vector
//   Packed              element of the packed activations: q + kOffset
//   load(p), load_tail(p, n)     kStep weights; the first n of them and zeros
//   dot(acc, x, w)      acc + x * w, in int32 lanes
//   reduce<N>(acc, out)   out[i] = sum of the lanes of acc[i], i < N
//
// Weights stay row-major: a vector holds kStep consecutive weights of one row, an accumulator the partial sums of one
// (row, token) pair, and lanes are added at the end. Unsigned activations (VNNI) carry an offset of 128, which costs
// one dot product with ones per vector of weights to take back.

inline int64_t dot_stride(int64_t cols) {
  return (cols + Dot::kStep - 1) / Dot::kStep * Dot::kStep;
}

int64_t dot_packed_nbytes(int64_t tokens, int64_t cols) {
  return tokens * dot_stride(cols) * static_cast<int64_t>(sizeof(Dot::Packed));
}

void dot_pack(const int8_t* q, int64_t, int64_t cols, int64_t begin, int64_t end, uint8_t* packed) {
  const int64_t stride = dot_stride(cols);
  auto* out = reinterpret_cast<Dot::Packed*>(packed);
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t k = 0; k < cols; ++k) {
      out[m * stride + k] = static_cast<Dot::Packed>(q[m * cols + k] + Dot::kOffset);
    }
    for (int64_t k = cols; k < stride; ++k) out[m * stride + k] = 0;
  }
}

// Sums of kRows rows times kTokens tokens over columns [begin, end) of a slab; they are added to `acc` unless `first`.
template <int kRows, int kTokens>
inline __attribute__((always_inline)) void dot_block(const WeightPanel& panel, int64_t n,
                                                     const Dot::Packed* x, int64_t stride,
                                                     int64_t begin, int64_t end,
                                                     const int32_t* offsets, bool first,
                                                     int32_t* acc) {
  Dot::Acc sums[kTokens][kRows];
  DCEXT_UNROLL for (int t = 0; t < kTokens; ++t) {
    DCEXT_UNROLL for (int r = 0; r < kRows; ++r) sums[t][r] = Dot::zero();
  }
  const int8_t* w = panel.data + n * panel.ld;
  int64_t k = begin;
  for (; k + Dot::kStep <= end; k += Dot::kStep) {
    Dot::Activations activations[kTokens];
    DCEXT_UNROLL for (int t = 0; t < kTokens; ++t) activations[t] =
        Dot::load_packed(x + t * stride + k);
    DCEXT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Dot::Weights weights = Dot::load(w + r * panel.ld + k);
      DCEXT_UNROLL for (int t = 0; t < kTokens; ++t) sums[t][r] =
          Dot::dot(sums[t][r], activations[t], weights);
    }
  }
  if (k < end) {
    DCEXT_UNROLL for (int r = 0; r < kRows; ++r) {
      const Dot::Weights tail = Dot::load_tail(w + r * panel.ld + k, end - k);
      DCEXT_UNROLL for (int t = 0; t < kTokens; ++t) {
        sums[t][r] = Dot::dot(sums[t][r], Dot::load_packed(x + t * stride + k), tail);
      }
    }
  }
  DCEXT_UNROLL for (int t = 0; t < kTokens; ++t) {
    int32_t lanes[kRows];
    Dot::Acc
        row_sums[kRows];  // a copy, so that `sums` never needs an address and stays in registers
    for (int r = 0; r < kRows; ++r) row_sums[r] = sums[t][r];
    Dot::reduce<kRows>(row_sums, lanes);
    int32_t* out = acc + t * panel.rows + n;
    DCEXT_UNROLL for (int r = 0; r < kRows; ++r) out[r] =
        lanes[r] - offsets[r] + (first ? 0 : out[r]);
  }
}

// kOffset * (sum of the row's weights in [begin, end)), for kRows rows.
template <int kRows>
inline __attribute__((always_inline)) void dot_offsets(const WeightPanel& panel, int64_t n,
                                                       int64_t begin, int64_t end,
                                                       int32_t* offsets) {
  if (Dot::kOffset == 0) {
    for (int r = 0; r < kRows; ++r) offsets[r] = 0;
    return;
  }
  Dot::Acc sums[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int8_t* w = panel.data + (n + r) * panel.ld;
    sums[r] = Dot::zero();
    int64_t k = begin;
    for (; k + Dot::kStep <= end; k += Dot::kStep) {
      sums[r] = Dot::dot(sums[r], Dot::ones(), Dot::load(w + k));
    }
    if (k < end) sums[r] = Dot::dot(sums[r], Dot::ones(), Dot::load_tail(w + k, end - k));
  }
  Dot::reduce<kRows>(sums, offsets);
  for (int r = 0; r < kRows; ++r) offsets[r] *= Dot::kOffset;
}

template <int kRows>
inline __attribute__((always_inline)) void dot_rows(const WeightPanel& panel, int64_t n,
                                                    const Dot::Packed* x, int64_t stride,
                                                    int64_t tokens, int64_t begin, int64_t end,
                                                    bool first, int32_t* acc) {
  int32_t offsets[kRows];
  dot_offsets<kRows>(panel, n, begin, end, offsets);
  int64_t m = 0;
  for (; m + Dot::kTokens <= tokens; m += Dot::kTokens) {
    dot_block<kRows, Dot::kTokens>(panel, n, x + m * stride, stride, begin, end, offsets, first,
                                   acc + m * panel.rows);
  }
  for (; m < tokens; ++m) {
    dot_block<kRows, 1>(panel, n, x + m * stride, stride, begin, end, offsets, first,
                        acc + m * panel.rows);
  }
}

// One token, weights from memory: one row after the other is one sequential stream, which the prefetcher follows.
void dot_vector(const WeightPanel& panel, const Dot::Packed* x, int32_t* acc) {
  constexpr int kUnroll = 4;
  for (int64_t n = 0; n < panel.rows; ++n) {
    const int8_t* w = panel.data + n * panel.ld;
    Dot::Acc sums[2 * kUnroll];
    for (int i = 0; i < 2 * kUnroll; ++i) sums[i] = Dot::zero();
    int64_t k = 0;
    for (; k + kUnroll * Dot::kStep <= panel.cols; k += kUnroll * Dot::kStep) {
      for (int i = 0; i < kUnroll; ++i) {
        const Dot::Weights weights = Dot::load(w + k + i * Dot::kStep);
        sums[i] = Dot::dot(sums[i], Dot::load_packed(x + k + i * Dot::kStep), weights);
        if (Dot::kOffset != 0)
          sums[kUnroll + i] = Dot::dot(sums[kUnroll + i], Dot::ones(), weights);
      }
      __builtin_prefetch(w + k + 4096);
    }
    for (; k < panel.cols; k += Dot::kStep) {
      const int64_t left = panel.cols - k;
      const Dot::Weights weights =
          left >= Dot::kStep ? Dot::load(w + k) : Dot::load_tail(w + k, left);
      sums[0] = Dot::dot(sums[0], Dot::load_packed(x + k), weights);
      if (Dot::kOffset != 0) sums[kUnroll] = Dot::dot(sums[kUnroll], Dot::ones(), weights);
    }
    const Dot::Acc products = Dot::add(Dot::add(sums[0], sums[1]), Dot::add(sums[2], sums[3]));
    const Dot::Acc ones = Dot::add(Dot::add(sums[4], sums[5]), Dot::add(sums[6], sums[7]));
    int32_t lanes[2];
    const Dot::Acc both[2] = {products, ones};
    Dot::reduce<2>(both, lanes);
    acc[n] = lanes[0] - Dot::kOffset * lanes[1];
  }
}

void dot_multiply(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc) {
  const auto* x = reinterpret_cast<const Dot::Packed*>(packed);
  if (tokens == 1) return dot_vector(panel, x, acc);
  // A slab of kRows rows stays in the L1 cache, the tokens of a block in the L2 cache.
  constexpr int64_t kColumnBlock = 3072, kTokenBlock = 96;
  const int64_t stride = dot_stride(panel.cols);
  for (int64_t m = 0; m < tokens; m += kTokenBlock) {
    const int64_t count = tokens - m < kTokenBlock ? tokens - m : kTokenBlock;
    for (int64_t begin = 0; begin < panel.cols; begin += kColumnBlock) {
      const int64_t end = panel.cols - begin < kColumnBlock ? panel.cols : begin + kColumnBlock;
      int64_t n = 0;
      for (; n + Dot::kRows <= panel.rows; n += Dot::kRows) {
        dot_rows<Dot::kRows>(panel, n, x + m * stride, stride, count, begin, end, begin == 0,
                             acc + m * panel.rows);
      }
      for (; n < panel.rows; ++n) {
        dot_rows<1>(panel, n, x + m * stride, stride, count, begin, end, begin == 0,
                    acc + m * panel.rows);
      }
    }
  }
}
