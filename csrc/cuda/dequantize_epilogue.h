#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/element_type.h"

namespace dcext {

/** launch_dequantize_epilogue():
 *  y[m, n] = (float(acc[m, n]) * row_scale[n]) * act_scale[m] + bias[n], each operation rounded to
 *  float32 and the result to `type`: the same bits as the CPU kernels, but for the payload of NaNs.
 *  @param acc   (tokens, rows) int32, row-major, device memory: the sums of an INT8 product.
 *  @param row_scale   (rows,). @param act_scale (tokens,). @param bias (rows,) or null.
 *  @param tokens, rows   >= 0; nothing is launched when either is 0.
 *  @param y   receives (tokens, rows) of `type`; must not overlap acc.
 *  @return cudaGetLastError(), or cudaErrorInvalidValue for sizes out of range. Asynchronous on
 *  `stream`; allocates nothing. Any alignment is accepted; aligned rows of a multiple of four
 *  columns move four at a time. */
cudaError_t launch_dequantize_epilogue(const int32_t* acc, const float* row_scale,
                                       const float* act_scale, const float* bias, int64_t tokens,
                                       int64_t rows, void* y, ElementType type,
                                       cudaStream_t stream);

}  // namespace dcext
