#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "base/element_type.h"

namespace dcext {

/** launch_quantize_activations():
 *  Quantizes each token to int8: v = x * col_scale, act_scale = max|v| / 127,
 *  q = round_half_even(v * (127 / max|v|)). act_scale and q are 0 for an all-zero token; act_scale is
 *  NaN and q 0 where a v is not finite, so that the outputs of that token are NaN. The same bits as
 *  the CPU kernels.
 *  @param x   (tokens, cols) of `type`, row-major, device memory.
 *  @param col_scale   (cols,) or null.
 *  @param tokens, cols   >= 0; tokens < 2^31. Nothing is launched when either is 0.
 *  @param q   receives (tokens, cols). @param act_scale receives (tokens,).
 *  @return cudaGetLastError(), or cudaErrorInvalidValue for sizes out of range. Asynchronous on
 *  `stream`; allocates nothing. Any alignment is accepted; where rows of x and q and col_scale are
 *  aligned, x is read 16 bytes at a time. */
cudaError_t launch_quantize_activations(const void* x, ElementType type, const float* col_scale,
                                        int64_t tokens, int64_t cols, int8_t* q, float* act_scale,
                                        cudaStream_t stream);

}  // namespace dcext
