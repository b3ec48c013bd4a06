#pragma once

#include <cstdint>

#include "base/cpu_features.h"
#include "base/element_type.h"
#include "codec/packed.h"

namespace dcext {

// Products of a panel (some consecutive rows of `qweight`, row-major, as decoded or as they rest) with the activations
// of all tokens. Integer sums are exact and float operations have one order, so that results are the same bits on
// every instruction set, for every split into panels and every number of threads.

/** A panel of weights. Nothing outside the `rows` x `cols` rectangle is read. */
struct WeightPanel {
  const int8_t* data;  ///< row-major
  int64_t ld;          ///< distance of rows in bytes, >= cols
  int64_t rows;
  int64_t cols;  ///< in_features, K
};

/** Where a panel's outputs go, and what turns sums into them. */
struct PanelOutput {
  const float* row_scale;  ///< (rows,)
  const float* bias;       ///< (rows,) or null
  void* y;                 ///< first output of the first token; tokens are `ld` elements apart
  int64_t ld;
  ElementType type;
};

/** Quantized tokens for multiply_packed. */
struct PackedInput {
  const int8_t* x;      ///< (tokens, ld), zeros behind the columns up to packed_cols(cols)
  int64_t ld;           ///< at least packed_cols(cols)
  const int32_t* sums;  ///< (tokens,): the sum of each token
};

/** The kernels of one instruction set. All of them accept any size >= 1, allocate nothing and never fail. */
struct GemmKernels {
  Isa isa;

  /** Quantizes one token to int8: v = x * col_scale, scale = max|v| / 127, q = round_half_even(v * (127 / max|v|)).
   *  scale and q are 0 for an all-zero token; scale is NaN and q 0 where v is not finite, so that the outputs of that
   *  token are NaN.
   *  @param x   (cols,) of `type`; @param col_scale (cols,) or null; @param q receives (cols,). */
  void (*quantize)(const void* x, ElementType type, const float* col_scale, int64_t cols, int8_t* q,
                   float* scale);

  /** Bytes of the packed activations of `tokens` tokens; a multiple of 64. */
  int64_t (*packed_nbytes)(int64_t tokens, int64_t cols);

  /** Lays out the quantized tokens [begin, end) as `multiply` reads them. `begin` is a multiple of kPackTokens; calls
   *  for different ranges may run at the same time.
   *  @param q   (tokens, ld), ld >= cols; @param packed `packed_nbytes(tokens, cols)` bytes, 64-byte aligned. */
  void (*pack)(const int8_t* q, int64_t ld, int64_t tokens, int64_t cols, int64_t begin,
               int64_t end, uint8_t* packed);

  /** acc[m * rows + n] = sum over k of weight[n, k] * q[m, k], in int32. Exact for up to kMaxSumCols columns.
   *  @param acc   (tokens, panel.rows). */
  void (*multiply)(const WeightPanel& panel, const uint8_t* packed, int64_t tokens, int32_t* acc);

  /** Tokens up to which multiply_packed is faster than unpacking a panel and multiply. */
  int64_t most_packed_tokens;

  /** The same sums straight from the codes of a packed panel. Reads kMaxPackedCols activations of each
   *  token at most, whatever the columns of its exceptions are.
   *  @param tile   of all columns of the matrix, counts_add_up(tile). */
  void (*multiply_packed)(const PackedTile& tile, const PackedInput& input, int64_t tokens,
                          int32_t* acc);

  /** y[m, n] = (float(acc[m, n]) * row_scale[n]) * act_scale[m] + bias[n], rounded to the output's dtype. */
  void (*dequantize)(const int32_t* acc, int64_t tokens, int64_t rows, const float* act_scale,
                     const PanelOutput& output);

  /** The same of sums that int32 cannot hold. */
  void (*dequantize_wide)(const int64_t* acc, int64_t tokens, int64_t rows, const float* act_scale,
                          const PanelOutput& output);

  /** Weight-only products: out[m, n] = row_scale[n] * sum_k float(weight[n, k]) * x[m, k] + bias[n] in float32. The
   *  sum has 16 partial sums (k mod 16), each in order of k, added as a binary tree.
   *  @param x   (tokens, align_up(cols, 16)) float32, col_scale applied, zeros behind the columns, 64-byte aligned.
   *  @param scratch   `weight_only_scratch_nbytes(cols)` bytes, 64-byte aligned. */
  void (*multiply_weight_only)(const WeightPanel& panel, const float* x, int64_t tokens,
                               float* scratch, const PanelOutput& output);

  /** out[k] = float(x[k]) * col_scale[k], zeros up to align_up(cols, 16). */
  void (*widen)(const void* x, ElementType type, const float* col_scale, int64_t cols, float* out);

  /** out[k] = (float(weight[k]) * row_scale) * col_scale[k], rounded to `type`: one row of an embedding. */
  void (*dequantize_row)(const int8_t* weight, int64_t cols, float row_scale,
                         const float* col_scale, ElementType type, void* out);
};

/** Columns whose sums of products of -128 .. 127 and -127 .. 127 fit in int32, whatever they are. A multiple of every
 *  kernel's step. */
constexpr int64_t kMaxSumCols = int64_t{1} << 17;
static_assert(kMaxSumCols * 128 * 127 <= INT32_MAX, "sums fit");

constexpr int64_t kPackTokens = 16;
constexpr int64_t kFewTokens = 16;  ///< up to here multiply_packed keeps the weights in registers
constexpr int64_t kAnyTokens = int64_t{1} << 62;
constexpr int64_t packed_cols(int64_t cols) {
  return (cols + kGroupCols - 1) / kGroupCols * kGroupCols;
}
constexpr int64_t kWeightOnlyRows = 4;  ///< rows that multiply_weight_only converts at a time

constexpr int64_t weight_only_cols(int64_t cols) { return (cols + 15) / 16 * 16; }
constexpr int64_t weight_only_scratch_nbytes(int64_t cols) {
  return kWeightOnlyRows * weight_only_cols(cols) * int64_t{sizeof(float)};
}

/** The kernels to use on `isa` for so many tokens; `isa` must be supported. Chosen once per call of a layer. */
const GemmKernels& gemm_kernels(Isa isa, int64_t tokens);

}  // namespace dcext
