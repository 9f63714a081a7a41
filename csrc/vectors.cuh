// Eight neighbouring activations between memory and registers: 16 bytes at once of a half type, 2 x 16 of float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// As they lie in memory, the first in the lowest bits: two of a half type to a word.
template <typename T>
struct alignas(16) Vector8 {
  std::uint32_t words[2 * sizeof(T)];
};

template <typename T>
__device__ __forceinline__ Vector8<T> read8(const T* from) {
  constexpr int kPieces = sizeof(Vector8<T>) / 16;
  Vector8<T> v;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(&v)[i] = reinterpret_cast<const uint4*>(from)[i];
  return v;
}

template <typename T>
__device__ __forceinline__ void write8(T* to, const Vector8<T>& v) {
  constexpr int kPieces = sizeof(Vector8<T>) / 16;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(&v)[i];
}

__device__ __forceinline__ void widen8(const Vector8<float>& v, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(v.words[i]);
}

__device__ __forceinline__ void widen8(const Vector8<__half>& v, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = __half22float2(*reinterpret_cast<const __half2*>(&v.words[i]));
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ void widen8(const Vector8<__nv_bfloat16>& v, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(v.words[i] << 16);
    x[2 * i + 1] = __uint_as_float(v.words[i] & 0xffff0000u);
  }
}

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ Vector8<T> narrow8(const float (&x)[8]) {
  Vector8<T> v;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v.words[i] = __float_as_uint(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        *reinterpret_cast<__half2*>(&v.words[i]) = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(&v.words[i]) = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      }
    }
  }
  return v;
}

template <typename T>
__device__ __forceinline__ void load8(const T* from, float (&x)[8]) {
  widen8(read8(from), x);
}

template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  write8(to, narrow8<T>(x));
}

}  // namespace pab
