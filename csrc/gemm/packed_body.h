// No include guard: compiled once per instruction set, inside that file's unnamed namespace, after unroll_body.h and a
// struct `PackedDot`:
//   Acc, Weights                  vector types: a lane per row, kRows lanes; four weights in each
//   kRows                         rows of a vector: 8 or 16
//   kOffset                       what Lookup adds to weights; 0 where they stay signed
//   kMostTokens                   tokens whose sums the registers hold beside what looking up takes
//   Lookup<kWidth>(table)         .weights<v>(group): vector v of a group
//   dot(acc, w, x)                acc + w * x, x being four int8 activations, the same for all rows
//   kDenseTokens                  tokens whose sums with two vectors of rows the registers hold
//   zero(), fill(i), add(a, b), store(p, acc), load(p), store_weights(p, w), load_weights(p)
//
// Few tokens: weights are taken from their codes to registers for up to kMostTokens tokens at a time. With one token and
// AVX-512, layers of 4.2 bits read 19 of the 29 GB/s that a core reads at most, and 29 of 49 with two.
//
// Many tokens: a slab of columns of two vectors of rows is taken from its codes to the L1 cache, exceptions put in their
// places, and multiplied there. The limit is the dot products; unlike those of row-major weights their lanes need not
// be added in the end.

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

constexpr int64_t kSlabGroups =
    16;                        // 512 columns: two vectors of rows take 16 KiB, half of an L1 cache
constexpr int64_t kSteps = 8;  // vectors of a group

// Products of kVectors vectors of rows, `steps` steps of four columns each, with kTokens tokens: what starts from
// `begin` [t] (a first slab) or from what is in `acc` (null: a further one) is stored there. `rows` of the lanes exist.
template <int kVectors, int kTokens>
inline void dense_block(const uint8_t* weights, int64_t steps, const int8_t* x, int64_t ld_x,
                        const int32_t* begin, int64_t rows, int64_t ld_acc, int32_t* acc) {
  constexpr int64_t kRows = PackedDot::kRows;
  int32_t partial[kVectors * kRows];
  const bool whole = rows == kVectors * kRows;
  PackedDot::Acc sums[kVectors * kTokens];
  unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
    const int32_t* from = acc + t * ld_acc;
    if (begin == nullptr && !whole) {
      std::memcpy(partial, from, static_cast<size_t>(rows) * sizeof(int32_t));
      from = partial;
    }
    unroll<kVectors>([&](auto v) DCEXT_LAMBDA {
      sums[t * kVectors + v] =
          begin != nullptr ? PackedDot::fill(begin[t]) : PackedDot::load(from + v * kRows);
    });
  });
  for (int64_t s = 0; s < steps; ++s) {
    PackedDot::Weights w[kVectors];
    unroll<kVectors>([&](auto v) DCEXT_LAMBDA {
      w[v] = PackedDot::load_weights(weights + (v * steps + s) * 4 * kRows);
    });
    unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
      unroll<kVectors>([&](auto v) DCEXT_LAMBDA {
        PackedDot::Acc& sum = sums[t * kVectors + v];
        sum = PackedDot::dot(sum, w[v], x + t * ld_x + 4 * s);
      });
    });
  }
  unroll<kTokens>([&](auto t) DCEXT_LAMBDA {
    int32_t* to = whole ? acc + t * ld_acc : partial;
    unroll<kVectors>(
        [&](auto v) DCEXT_LAMBDA { PackedDot::store(to + v * kRows, sums[t * kVectors + v]); });
    if (!whole) {
      std::memcpy(acc + t * ld_acc, partial, static_cast<size_t>(rows) * sizeof(int32_t));
    }
  });
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

  // Takes the groups from g on of the rows from `row` on to `weights`: [vector][step][row][4 columns].
  void unpack_slab(int64_t row, int64_t vectors, int64_t g, int64_t groups,
                   uint8_t* weights) const {
    constexpr int64_t kBytes = 4 * PackedDot::kRows;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t first = row + v * PackedDot::kRows;
      const uint8_t* codes = tile.codes + first / kBlockRows * tile.block_nbytes() +
                             first % kBlockRows * 4 + g * kWidth * kPieceNbytes;
      for (int64_t i = 0; i < groups; ++i) {
        unroll<kSteps>([&](auto step) DCEXT_LAMBDA {
          PackedDot::store_weights(
              weights + ((v * groups + i) * kSteps + step) * kBytes,
              lookup.template weights<step>(codes + i * kWidth * kPieceNbytes));
        });
      }
    }
  }

  // Puts the exceptions of one slab in their places. at[r] is the next of row r, and moves on.
  void put_exceptions(int64_t rows, int64_t g, int64_t groups, int64_t* at, const int64_t* ends,
                      uint8_t* weights) const {
    constexpr int64_t kRows = PackedDot::kRows;
    const int64_t first = g * kGroupCols, end = first + groups * kGroupCols;
    for (int64_t r = 0; r < rows; ++r) {
      for (; at[r] < ends[r] && tile.column(at[r]) < end; ++at[r]) {
        const int64_t col = tile.column(at[r]) - first;
        if (col < 0) continue;  // not ascending: such a payload is refused where it is verified
        const int64_t step = r / kRows * groups * kSteps + col / 4;
        weights[(step * kRows + r % kRows) * 4 + col % 4] =
            static_cast<uint8_t>(static_cast<uint8_t>(tile.values[at[r]]) + PackedDot::kOffset);
      }
    }
  }

  template <int kVectors>
  void multiply_slab(const uint8_t* weights, int64_t g, int64_t groups, int64_t rows,
                     int64_t tokens, int32_t* acc) const {
    constexpr int kMost = PackedDot::kDenseTokens;
    const auto multiply = [&](int64_t m, auto count) DCEXT_LAMBDA {
      int32_t begin[kMost];
      for (int t = 0; t < count; ++t) {
        begin[t] = static_cast<int32_t>(0u - PackedDot::kOffset *
                                                 static_cast<uint32_t>(input.sums[m + t]));
      }
      dense_block<kVectors, count>(weights, groups * kSteps,
                                   input.x + m * input.ld + g * kGroupCols, input.ld,
                                   g == 0 ? begin : nullptr, rows, tile.rows, acc + m * tile.rows);
    };
    int64_t m = 0;
    for (; m + kMost <= tokens; m += kMost) multiply(m, std::integral_constant<int, kMost>{});
    for (; m + 4 <= tokens; m += 4) multiply(m, std::integral_constant<int, 4>{});
    for (; m < tokens; ++m) multiply(m, std::integral_constant<int, 1>{});
  }

  void multiply_many(int64_t tokens, int32_t* acc) const {
    constexpr int64_t kRows = 2 * PackedDot::kRows;
    alignas(64) uint8_t weights[kRows * kSlabGroups * kGroupCols];
    int64_t at[kRows], ends[kRows], exception = 0;
    for (int64_t row = 0; row < tile.rows; row += kRows) {
      const int64_t rows = smaller(kRows, tile.rows - row);
      const int64_t vectors = rows > PackedDot::kRows ? 2 : 1;
      for (int64_t r = 0; r < rows; ++r) {
        at[r] = exception;
        ends[r] = exception += tile.num_exceptions == 0 ? 0 : tile.row_exceptions(row + r);
      }
      for (int64_t g = 0; g < tile.num_groups(); g += kSlabGroups) {
        const int64_t groups = smaller(kSlabGroups, tile.num_groups() - g);
        unpack_slab(row, vectors, g, groups, weights);
        put_exceptions(rows, g, groups, at, ends, weights);
        if (vectors == 2) {
          multiply_slab<2>(weights, g, groups, rows, tokens, acc + row);
        } else {
          multiply_slab<1>(weights, g, groups, rows, tokens, acc + row);
        }
      }
    }
  }

  void multiply(int64_t tokens, int32_t* acc) const {
    if (tokens > kFewTokens) return multiply_many(tokens, acc);
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
