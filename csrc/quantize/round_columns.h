#pragma once

#include <cstdint>

#include "base/cpu_features.h"
#include "base/parallel.h"

namespace dcext {

/** Longest code-length table: |q| of 0 to 127. */
constexpr int64_t kNumLevels = 128;

/** Entries of a rounding table: one for each half-open interval [k / 2, (k + 1) / 2), k from -256 to 255. */
constexpr int64_t kTableSize = 512;

/** Rows of a block that correct each other are a multiple of kRowGroup, at most kMaxRowBlock. */
constexpr int64_t kRowGroup = 8;
constexpr int64_t kMaxRowBlock = 256;

/** A block of columns to round one after the other, from the last to the first, each corrected by the errors of those
 *  behind it; with `row_feedback`, in each column one row after the other, from the last of its block of rows to the
 *  first, each corrected by the rows behind it. Matrices are column-major (`rows` contiguous values per column), so that
 *  rows are SIMD lanes. */
struct RoundColumns {
  int64_t rows;
  int64_t cols;
  const float* weight;  ///< (cols, rows): what the errors are taken against
  float* target;  ///< (cols, rows): weight corrected by the columns behind this block; destroyed
  const float*
      feedback;       ///< (cols, cols) row-major: target[i] += error[k] * feedback[k, i] for i < k
  const float* step;  ///< (cols,), positive
  const float*
      pull;  ///< (kNumLevels,): a magnitude between level - 1 and level rounds down below the middle plus this
  const float*
      row_feedback;  ///< (blocks, row_block, row_block), zero but for [n, m] with m < n: what row n's target
                     ///< less its value moves the target of row m of the same block; may be null
  int64_t row_block;  ///< rows in each block but the last, which may have fewer
  const int8_t*
      nearest;  ///< (panels, kTableSize), or null: instead of `pull`, a target of v steps in row n becomes
  ///< nearest[n / panel_rows, floor(2 v) + 256], the ends of the table going on for ever
  int64_t panel_rows;  ///< positive where there are tables
  int8_t* q;           ///< (cols, rows): receives the integers, in [-127, 127] or of the tables
  float* error;        ///< (cols, rows): receives weight - q * step
  Isa isa;             ///< must be supported
};

/** Rounds the block. Blocks of rows do not depend on each other and float operations have one order: the same bits for
 *  every number of threads and instruction set. Allocates nothing and cannot fail; what is not finite becomes some integer. */
void round_columns(const RoundColumns& call, Executor& executor);

}  // namespace dcext
