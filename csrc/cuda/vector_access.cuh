#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dcext {

// What the elementwise kernels share: conversions to and from float32, and several elements per
// memory access.

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

// Round to nearest even.
template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

/** kSize elements that move as one access of up to 16 bytes; two where they are larger. */
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Vector {
  T values[kSize];
};

template <int kSize, typename T>
__device__ Vector<T, kSize> load_vector(const T* src) {
  return *reinterpret_cast<const Vector<T, kSize>*>(src);
}

// The intrinsic, because nvcc does not always merge the stores of a struct's elements.
template <int kSize, typename T>
__device__ void store_vector(T* dst, const Vector<T, kSize>& vector) {
  if constexpr (sizeof(vector) == 16) {
    __stwb(reinterpret_cast<uint4*>(dst), reinterpret_cast<const uint4&>(vector));
  } else if constexpr (sizeof(vector) == 8) {
    __stwb(reinterpret_cast<uint2*>(dst), reinterpret_cast<const uint2&>(vector));
  } else if constexpr (sizeof(vector) == 4) {
    __stwb(reinterpret_cast<unsigned*>(dst), reinterpret_cast<const unsigned&>(vector));
  } else {
    static_assert(kSize == 1, "a vector is stored by one access of 4, 8 or 16 bytes");
    *dst = vector.values[0];
  }
}

/** Whether `kSize` elements starting at `pointer` and at every multiple of them may move as one
 * `Vector`. */
template <typename T, int kSize>
bool is_vector_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Vector<T, kSize>) == 0;
}

}  // namespace dcext
