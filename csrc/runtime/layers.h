#pragma once

#include "base/parallel.h"
#include "format/payload.h"
#include "gemm/int8_gemm.h"
#include "runtime/panel_source.h"

namespace dcext {

/** How activations enter the product: quantized to int8 per token (W8A8), or as they are, in float32 (W8A16). */
enum class Activations : int { kInt8 = 0, kNone = 1 };

/** The widest layer with quantized activations: far beyond any model, and its sums are far below 2^63. */
constexpr int64_t kMaxInt8Cols = int64_t{1} << 24;

/** y = row_scale * (qweight @ (x * col_scale)) + bias for `tokens` tokens. */
struct LinearCall {
  const PayloadView* weight;
  PanelSource* source;     ///< brings the panels, or null where `weight` has its chunks
  const float* row_scale;  ///< (rows,)
  const float* col_scale;  ///< (cols,) or null
  const float* bias;       ///< (rows,) or null
  const void* x;           ///< (tokens, cols) of `type`, contiguous
  void* y;                 ///< (tokens, rows) of `type`, contiguous
  ElementType type;
  int64_t tokens;
  Activations activations;
  Isa isa;
};

/** Runs a layer: each panel is decoded into a thread's own scratch, which fits in the L2 cache, and multiplied there;
 *  raw panels are multiplied where they lie, and so, with quantized tokens, are packed ones. Memory carries the stored bytes once per 2,048 tokens.
 *  Stored bytes are not compared with their checksums, which is done when a payload is loaded; those that a source
 *  brings are compared each time.
 *  Sums of more than kMaxSumCols columns are made of int32 sums of so many, in int64.
 *  @return the failure of the lowest failing chunk, else kOk. On failure `y` is partly written.
 *  Threading: any number of calls at the same time. Scratch is per thread, grows to what the largest layer needs
 *  (panel + activations + sums of 2,048 tokens, or of fewer with 2^28 activations) and is kept. */
Failure run_linear(const LinearCall& call, Executor& executor);

/** out[i, :] = qweight[indices[i], :] * row_scale[indices[i]] * col_scale, in the dtype of the output. */
struct EmbeddingCall {
  const PayloadView* weight;
  PanelSource* source;     ///< as in LinearCall
  const float* row_scale;  ///< (rows,)
  const float* col_scale;  ///< (cols,) or null
  const int64_t* indices;  ///< (count,), each in [0, rows); checked by the caller
  int64_t count;
  void* out;  ///< (count, cols) of `type`, contiguous
  ElementType type;
  Isa isa;
};

/** Looks rows up; every panel that is touched is decoded once. Otherwise as run_linear. */
Failure run_embedding(const EmbeddingCall& call, Executor& executor);

}  // namespace dcext
