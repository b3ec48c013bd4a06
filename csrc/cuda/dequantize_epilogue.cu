// From the int32 sums of an INT8 product to the layer's output.
//
//   y[m, n] = cast((float(acc[m, n]) * row_scale[n]) * act_scale[m] + bias[n])
//
// Layout: acc (tokens, rows) int32, row_scale (rows,), act_scale (tokens,) and bias (rows,) float32,
//   y (tokens, rows) float32 / bfloat16 / float16, all dense and row-major; `rows` are the rows of
//   the weight, so the columns here.
// Launch: blockIdx.x covers 512 columns (128 threads of four each; of one each where rows are not
//   aligned), blockIdx.y strides over tokens, so that a column's scales are loaded once per block
//   and not once per token. No shared memory.
// Rounding: products and sums are kept apart (no FMA), as the CPU kernels do.
// Measured: nothing yet.

#include "cuda/dequantize_epilogue.h"

#include <limits>

#include "cuda/vector_access.cuh"

namespace dcext {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;  // CUDA's limit
// Tokens of a block: enough to reuse the scales, few enough to fill a GPU at 128 tokens.
constexpr int64_t kTokensPerBlock = 4;

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads)
    dequantize_epilogue_kernel(const int32_t* __restrict__ acc,      // (tokens, rows) int32
                               const float* __restrict__ row_scale,  // (rows,) float32
                               const float* __restrict__ act_scale,  // (tokens,) float32
                               const float* __restrict__ bias,       // (rows,) float32, or null
                               int64_t tokens,                       //
                               int64_t rows,                         // a multiple of kSize
                               T* __restrict__ y) {                  // (tokens, rows)
  const int64_t n = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kSize;
  if (n >= rows) return;
  const Vector<float, kSize> scales = load_vector<kSize>(row_scale + n);
  Vector<float, kSize> offsets = {};
  if (bias != nullptr) offsets = load_vector<kSize>(bias + n);
  for (int64_t m = blockIdx.y; m < tokens; m += gridDim.y) {
    const Vector<int32_t, kSize> sums = load_vector<kSize>(acc + m * rows + n);
    const float token_scale = act_scale[m];
    Vector<T, kSize> outputs;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float value = __fmul_rn(__int2float_rn(sums.values[i]), scales.values[i]);
      value = __fmul_rn(value, token_scale);
      // Not without a bias: -0 + 0 would lose its sign.
      if (bias != nullptr) value = __fadd_rn(value, offsets.values[i]);
      outputs.values[i] = from_float<T>(value);
    }
    store_vector(y + m * rows + n, outputs);
  }
}

template <typename T, int kSize>
cudaError_t launch_sized(const int32_t* acc, const float* row_scale, const float* act_scale,
                         const float* bias, int64_t tokens, int64_t rows, T* y,
                         cudaStream_t stream) {
  const int64_t grid_x = (rows + kThreads * kSize - 1) / (kThreads * kSize);
  if (grid_x > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  const int64_t wanted_y = (tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const int64_t grid_y = wanted_y < kMaxGridY ? wanted_y : kMaxGridY;
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  dequantize_epilogue_kernel<T, kSize>
      <<<grid, kThreads, 0, stream>>>(acc, row_scale, act_scale, bias, tokens, rows, y);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const int32_t* acc, const float* row_scale, const float* act_scale,
                         const float* bias, int64_t tokens, int64_t rows, void* y,
                         cudaStream_t stream) {
  constexpr int kSize = 4;
  T* typed = static_cast<T*>(y);
  const bool aligned = rows % kSize == 0 && is_vector_aligned<int32_t, kSize>(acc) &&
                       is_vector_aligned<float, kSize>(row_scale) &&
                       is_vector_aligned<T, kSize>(typed) &&
                       (bias == nullptr || is_vector_aligned<float, kSize>(bias));
  const auto launch = aligned ? launch_sized<T, kSize> : launch_sized<T, 1>;
  return launch(acc, row_scale, act_scale, bias, tokens, rows, typed, stream);
}

}  // namespace

cudaError_t launch_dequantize_epilogue(const int32_t* acc, const float* row_scale,
                                       const float* act_scale, const float* bias, int64_t tokens,
                                       int64_t rows, void* y, ElementType type,
                                       cudaStream_t stream) {
  if (tokens < 0 || rows < 0) return cudaErrorInvalidValue;
  if (tokens == 0 || rows == 0) return cudaSuccess;
  switch (type) {
    case ElementType::kFloat32:
      return launch_typed<float>(acc, row_scale, act_scale, bias, tokens, rows, y, stream);
    case ElementType::kBFloat16:
      return launch_typed<__nv_bfloat16>(acc, row_scale, act_scale, bias, tokens, rows, y, stream);
    case ElementType::kFloat16:
      return launch_typed<__half>(acc, row_scale, act_scale, bias, tokens, rows, y, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dcext
