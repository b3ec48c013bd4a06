#pragma once

#include "codec/payload_decoder.h"
#include "gemm/int8_gemm.h"
#include "runtime/panel_source.h"

namespace dcext {

/** The float matrix that a layer stands for: qweight[n, k] * row_scale[n] * col_scale[k]. */
struct DequantizeCall {
  const PayloadView* weight;
  PanelSource* source;  ///< brings the panels, or null where `weight` has its chunks
  Verify verify;  ///< whether chunks that lie in memory are verified; those of a source always are
  const float* row_scale;  ///< (rows,)
  const float* col_scale;  ///< (cols,) or null
  void* out;               ///< (block_panels * panel_rows, cols) of `type`, contiguous
  ElementType type;
  int64_t block_panels;  ///< panels that `out` has room for; at least 1
  Isa isa;
};

/** Makes the matrix block by block, in order: each panel is decoded into a thread's scratch and scaled from there, once.
 *  @param use   called behind each block, on the thread that calls, when rows [row_begin, row_end) are in `out`; the
 *      next block overwrites them.
 *  @return the failure of the lowest failing chunk, else kOk; `use` is not called with a block that failed.
 *  Threading: as run_linear. */
Failure run_dequantize(const DequantizeCall& call, Executor& executor,
                       FunctionRef<void(int64_t row_begin, int64_t row_end)> use);

}  // namespace dcext
