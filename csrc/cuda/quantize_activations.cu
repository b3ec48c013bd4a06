// Dynamic per-token quantization of activations to int8, with the column scales applied on the way.
//
//   v[m, k]      = float(x[m, k]) * col_scale[k]
//   act_scale[m] = max_k |v[m, k]| / 127
//   q[m, k]      = round_half_even(v[m, k] * (127 / max_k |v[m, k]|))
//
// Layout: x (tokens, cols) float32 / bfloat16 / float16, col_scale (cols,) float32, q (tokens, cols)
//   int8, act_scale (tokens,) float32, all dense and row-major.
// Launch: one block per token, 32 to 512 threads; a thread takes 16 bytes of x at a time where rows
//   are aligned. Shared memory: 64 bytes, static. A row is read twice, the second time from cache.
// Measured: nothing yet.

#include "cuda/quantize_activations.h"

#include <limits>

#include "cuda/vector_access.cuh"

namespace dcext {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;  // four blocks fill an SM of 2,048 threads
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr unsigned kFullWarp = 0xffffffffu;
// A float without its sign, read as an integer, orders like |v|; infinity is above all numbers and
// NaN above infinity, so that one maximum finds both.
constexpr unsigned kAbsMask = 0x7fffffffu;
constexpr unsigned kInfinityBits = 0x7f800000u;
constexpr unsigned kQuietNanBits = 0x7fc00000u;
constexpr float kMaxQuantized = 127.0f;
// Below, 127 / max overflows; such tokens are zero for any purpose.
constexpr float kSmallestMax = 1e-36f;

/** The block's largest value, in all threads; `partial` has kMaxWarps elements of shared memory. */
__device__ unsigned block_max(unsigned value, unsigned* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = __reduce_max_sync(kFullWarp, value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return __reduce_max_sync(kFullWarp, lane < num_warps ? partial[lane] : 0u);
}

/** kSize consecutive elements of x as float32, times their column scales. */
template <int kSize, typename T>
__device__ Vector<float, kSize> load_scaled(const T* x, const float* col_scale) {
  const Vector<T, kSize> stored = load_vector<kSize>(x);
  Vector<float, kSize> scaled;
#pragma unroll
  for (int i = 0; i < kSize; ++i) scaled.values[i] = to_float(stored.values[i]);
  if (col_scale == nullptr) return scaled;
  const Vector<float, kSize> factors = load_vector<kSize>(col_scale);
#pragma unroll
  for (int i = 0; i < kSize; ++i) scaled.values[i] = __fmul_rn(scaled.values[i], factors.values[i]);
  return scaled;
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_activations_kernel(const T* __restrict__ x,              // (tokens, cols)
                                const float* __restrict__ col_scale,  // (cols,) float32, or null
                                int64_t cols,                         // a multiple of kSize
                                int8_t* __restrict__ q,               // (tokens, cols) int8
                                float* __restrict__ act_scale) {      // (tokens,) float32
  __shared__ unsigned partial[kMaxWarps];
  x += blockIdx.x * cols;
  q += blockIdx.x * cols;
  const int64_t first = int64_t{threadIdx.x} * kSize;
  const int64_t step = int64_t{blockDim.x} * kSize;
  const auto load = [&](int64_t k) {
    return load_scaled<kSize>(x + k, col_scale == nullptr ? nullptr : col_scale + k);
  };

  unsigned max_bits = 0;
  for (int64_t k = first; k < cols; k += step) {
    const Vector<float, kSize> v = load(k);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      max_bits = max(max_bits, __float_as_uint(v.values[i]) & kAbsMask);
  }
  max_bits = block_max(max_bits, partial);

  const bool finite = max_bits < kInfinityBits;
  const float largest = __uint_as_float(max_bits);
  if (threadIdx.x == 0) {
    act_scale[blockIdx.x] =
        finite ? __fdiv_rn(largest, kMaxQuantized) : __uint_as_float(kQuietNanBits);
  }
  const bool is_zero = !finite || largest < kSmallestMax;
  const float inverse = is_zero ? 0.0f : __fdiv_rn(kMaxQuantized, largest);
  for (int64_t k = first; k < cols; k += step) {
    Vector<int8_t, kSize> quantized = {};
    if (!is_zero) {
      const Vector<float, kSize> v = load(k);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {  // |v * inverse| <= 127 (1 + 2^-23): nothing to clamp
        quantized.values[i] = static_cast<int8_t>(__float2int_rn(__fmul_rn(v.values[i], inverse)));
      }
    }
    store_vector(q + k, quantized);
  }
}

template <typename T, int kSize>
cudaError_t launch_sized(const T* x, const float* col_scale, int64_t tokens, int64_t cols,
                         int8_t* q, float* act_scale, cudaStream_t stream) {
  const int64_t warps = (cols + kSize * kWarpSize - 1) / (kSize * kWarpSize);
  const int threads = kWarpSize * static_cast<int>(warps < kMaxWarps ? warps : kMaxWarps);
  quantize_activations_kernel<T, kSize>
      <<<static_cast<unsigned>(tokens), threads, 0, stream>>>(x, col_scale, cols, q, act_scale);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const void* x, const float* col_scale, int64_t tokens, int64_t cols,
                         int8_t* q, float* act_scale, cudaStream_t stream) {
  constexpr int kSize = 16 / sizeof(T);
  const T* typed = static_cast<const T*>(x);
  const bool aligned = cols % kSize == 0 && is_vector_aligned<T, kSize>(typed) &&
                       is_vector_aligned<int8_t, kSize>(q) &&
                       (col_scale == nullptr || is_vector_aligned<float, kSize>(col_scale));
  return aligned ? launch_sized<T, kSize>(typed, col_scale, tokens, cols, q, act_scale, stream)
                 : launch_sized<T, 1>(typed, col_scale, tokens, cols, q, act_scale, stream);
}

}  // namespace

cudaError_t launch_quantize_activations(const void* x, ElementType type, const float* col_scale,
                                        int64_t tokens, int64_t cols, int8_t* q, float* act_scale,
                                        cudaStream_t stream) {
  if (tokens < 0 || cols < 0 || tokens > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  if (tokens == 0 || cols == 0) return cudaSuccess;
  switch (type) {
    case ElementType::kFloat32:
      return launch_typed<float>(x, col_scale, tokens, cols, q, act_scale, stream);
    case ElementType::kBFloat16:
      return launch_typed<__nv_bfloat16>(x, col_scale, tokens, cols, q, act_scale, stream);
    case ElementType::kFloat16:
      return launch_typed<__half>(x, col_scale, tokens, cols, q, act_scale, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dcext
