// No include guard: compiled once per instruction set, inside that file's unnamed namespace, after unroll_body.h and a
// struct `PackedDot`:
//   Acc, Weights                  vector types: a lane per row, kRows lanes; four weights in each
//   kRows                         rows of a vector: 8 or 16
//   kOffset                       what Lookup adds to weights; 0 where they stay signed
//   kMostTokens                   tokens whose sums the registers hold beside what looking up takes
//   Lookup<kWidth>(table)         .weights<v>(group): vector v of a group
//   dot(acc, w, x)                acc + w * x, x being four int8 activations, the same for all rows
//   zero(), add(a, b), store(p, acc)
//
// Weights are taken from their codes to registers once for up to kMostTokens tokens. With one token the limit is the
// memory: 4 bits 30 of 31 GB/s, 5 bits 25. Beyond a few tokens it is the dot products, as for raw weights.

constexpr int64_t kPrefetchCodes = 4096;  // bytes ahead; less was slower from memory
constexpr int64_t kMostSummed = 1024;  // exceptions of a block whose running sums are kept: 4 KiB

// Chains of sums, so that a product need not wait for the one before it.
constexpr int packed_chains(int tokens) { return tokens == 1 ? 4 : tokens <= 4 ? 2 : 1; }

// Sums of kRows rows, whose codes are in each piece from `codes` on, with kTokens tokens from `x` on: sums[t * 16 + r].
template <int kWidth, int kTokens>
inline void packed_rows(const typename PackedDot::template Lookup<kWidth>& lookup,
                        const uint8_t* codes, int64_t groups, const int8_t* x, int64_t ld_x,
                        int32_t* sums) {
  constexpr int kChains = packed_chains(kTokens);
  PackedDot::Acc acc[kTokens * kChains];
  unroll<kTokens * kChains>([&](auto i) DCEXT_LAMBDA { acc[i] = PackedDot::zero(); });
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* group = codes + g * kWidth * kPieceNbytes;
    const int8_t* activations = x + g * kGroupCols;
    unroll<kWidth>([&](auto piece) DCEXT_LAMBDA {
      __builtin_prefetch(group + piece * kPieceNbytes + kPrefetchCodes);
    });
    unroll<8>([&](auto v) DCEXT_LAMBDA {
      const PackedDot::Weights weights = lookup.template weights<v>(group);
      unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
        constexpr int kAt = t * kChains + v % kChains;
        acc[kAt] = PackedDot::dot(acc[kAt], weights, activations + t * ld_x + 4 * v);
      });
    });
  }
  unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
    PackedDot::Acc total = acc[t * kChains];
    unroll<kChains - 1>(
        [&](auto i) DCEXT_LAMBDA { total = PackedDot::add(total, acc[t * kChains + 1 + i]); });
    PackedDot::store(sums + t * kBlockRows, total);
  });
}

// What the exceptions from `first` on, those of row r to ends[r], add to the sums of kTokens tokens. Running sums, of
// which rows are differences: a loop for each row would mispredict its end, which costs more than five exceptions.
template <int kTokens>
inline void add_few_exceptions(const PackedTile& tile, int64_t first, const int64_t* ends,
                               int64_t rows, const PackedInput& input, int64_t m, int32_t* acc) {
  uint32_t running[kMostSummed + 1][kTokens];
  uint32_t sum[kTokens] = {};
  const int64_t count = ends[rows - 1] - first;
  const int8_t* x = input.x + m * input.ld;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t missing = int32_t{tile.values[first + i]} - tile.table[0];
    const int8_t* column = x + tile.column(first + i);
    for (int t = 0; t < kTokens; ++t) {
      running[i][t] = sum[t];
      sum[t] += static_cast<uint32_t>(missing * column[t * input.ld]);
    }
  }
  std::memcpy(running[count], sum, sizeof(sum));
  for (int t = 0; t < kTokens; ++t) {
    int32_t* out = acc + (m + t) * tile.rows;
    uint32_t before = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t behind = running[ends[r] - first][t];
      out[r] = static_cast<int32_t>(static_cast<uint32_t>(out[r]) + behind - before);
      before = behind;
    }
  }
}

// The same for one row with any number of exceptions.
inline void add_row_exceptions(const PackedTile& tile, int64_t begin, int64_t end,
                               const PackedInput& input, int64_t tokens, int32_t* acc) {
  for (int64_t m = 0; m < tokens; ++m) {
    uint32_t sum = static_cast<uint32_t>(acc[m * tile.rows]);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t missing = int32_t{tile.values[i]} - tile.table[0];
      sum += static_cast<uint32_t>(missing * input.x[m * input.ld + tile.column(i)]);
    }
    acc[m * tile.rows] = static_cast<int32_t>(sum);
  }
}

// Adds the exceptions of one block, from `first` on. Returns the first of the next block.
inline int64_t add_exceptions(const PackedTile& tile, int64_t first_row, int64_t rows,
                              int64_t first, const PackedInput& input, int64_t tokens,
                              int32_t* acc) {
  int64_t ends[kBlockRows], end = first;
  for (int64_t r = 0; r < rows; ++r) ends[r] = end += tile.row_exceptions(first_row + r);
  if (first == end) return end;
  if (end - first > kMostSummed) {
    for (int64_t r = 0; r < rows; ++r) {
      add_row_exceptions(tile, r == 0 ? first : ends[r - 1], ends[r], input, tokens, acc + r);
    }
    return end;
  }
  int64_t m = 0;
  for (; m + 4 <= tokens; m += 4) add_few_exceptions<4>(tile, first, ends, rows, input, m, acc);
  for (; m < tokens; ++m) add_few_exceptions<1>(tile, first, ends, rows, input, m, acc);
  return end;
}

template <int kWidth>
struct PackedPanel {
  const PackedTile& tile;
  const PackedInput& input;
  typename PackedDot::template Lookup<kWidth> lookup{tile.table};

  // kTokens tokens from token m on, the rows of block b.
  template <int kTokens>
  void multiply_block(int64_t b, int64_t rows, int64_t m, int32_t* acc) const {
    int32_t sums[kTokens][kBlockRows];
    const uint8_t* codes = tile.codes + b * tile.block_nbytes();
    for (int half = 0; half < kBlockRows / PackedDot::kRows; ++half) {
      packed_rows<kWidth, kTokens>(lookup, codes + half * 4 * PackedDot::kRows, tile.num_groups(),
                                   input.x + m * input.ld, input.ld,
                                   sums[0] + half * PackedDot::kRows);
    }
    for (int t = 0; t < kTokens; ++t) {
      // Sums with an offset may wrap around; the difference does not.
      const uint32_t offset = PackedDot::kOffset * static_cast<uint32_t>(input.sums[m + t]);
      int32_t* out = acc + (m + t) * tile.rows;
      for (int64_t r = 0; r < rows; ++r) {
        out[r] = static_cast<int32_t>(static_cast<uint32_t>(sums[t][r]) - offset);
      }
    }
  }

  void multiply(int64_t tokens, int32_t* acc) const {
    int64_t exception = 0;
    for (int64_t b = 0; b < tile.num_blocks(); ++b) {
      const int64_t row = b * kBlockRows, rows = smaller(kBlockRows, tile.rows - row);
      int64_t m = 0;
      if constexpr (PackedDot::kMostTokens >= 8) {
        for (; m + 8 <= tokens; m += 8) multiply_block<8>(b, rows, m, acc + row);
      }
      for (; m + 4 <= tokens; m += 4) multiply_block<4>(b, rows, m, acc + row);
      for (; m + 2 <= tokens; m += 2) multiply_block<2>(b, rows, m, acc + row);
      if (m < tokens) multiply_block<1>(b, rows, m, acc + row);
      if (tile.num_exceptions != 0) {
        exception = add_exceptions(tile, row, rows, exception, input, tokens, acc + row);
      }
    }
  }
};

void multiply_packed(const PackedTile& tile, const PackedInput& input, int64_t tokens,
                     int32_t* acc) {
  switch (tile.width) {
    case 2: return PackedPanel<2>{tile, input}.multiply(tokens, acc);
    case 3: return PackedPanel<3>{tile, input}.multiply(tokens, acc);
    case 4: return PackedPanel<4>{tile, input}.multiply(tokens, acc);
    case 5: return PackedPanel<5>{tile, input}.multiply(tokens, acc);
    default: return PackedPanel<6>{tile, input}.multiply(tokens, acc);
  }
}
