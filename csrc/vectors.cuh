// Eight neighbouring activations between memory and registers: 16 bytes at once of a half type, 2 x 16 of float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pab {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
struct alignas(16) Vector8 {
  T at[8];
};

template <typename T>
__device__ __forceinline__ void load8(const T* from, float (&x)[8]) {
  constexpr int kPieces = sizeof(Vector8<T>) / 16;
  Vector8<T> v;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(&v)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float(v.at[i]);
}

template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  constexpr int kPieces = sizeof(Vector8<T>) / 16;
  Vector8<T> v;
#pragma unroll
  for (int i = 0; i < 8; ++i) v.at[i] = from_float<T>(x[i]);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&v)[i];
}

}  // namespace pab
