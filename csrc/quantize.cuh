// 8-bit values inside kernels, bit for bit those of pab_kernels/ops/quantize/reference.py (NaNs have no particular bits):
//   1. scale = max |x| / 127 (int8) or / 448 (e4m3), a true division
//   2. data = x / scale rounded to nearest even and clamped, 0 where scale is 0
//   3. value = data * scale
// All in float32. The scale of a group that holds an infinity or NaN is infinite or NaN, and the group dequantises to NaN.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace pab {

using Float8 = __nv_fp8_e4m3;

template <typename Eight>
struct EightBits;

template <>
struct EightBits<std::int8_t> {
  static constexpr float kLimit = 127.0f;

  // __float2int_rn makes NaN 0, as in the reference; fminf and fmaxf would make it a limit.
  static __device__ __forceinline__ unsigned narrow(float q) { return min(max(__float2int_rn(q), -127), 127) & 0xff; }

  static __device__ __forceinline__ std::uint32_t narrow4(const float (&q)[4]) {
    return narrow(q[0]) | narrow(q[1]) << 8 | narrow(q[2]) << 16 | narrow(q[3]) << 24;
  }

  // A byte b in the last bits of 2^23 gives 2^23 + b: one permutation and one addition, where a conversion runs at a quarter of the rate.
  static __device__ __forceinline__ void widen4(std::uint32_t data, float (&q)[4]) {
    data ^= 0x80808080u;  // b + 128
    q[0] = __uint_as_float(__byte_perm(data, 0x4b000000u, 0x7650)) - 8388736.0f;
    q[1] = __uint_as_float(__byte_perm(data, 0x4b000000u, 0x7651)) - 8388736.0f;
    q[2] = __uint_as_float(__byte_perm(data, 0x4b000000u, 0x7652)) - 8388736.0f;
    q[3] = __uint_as_float(__byte_perm(data, 0x4b000000u, 0x7653)) - 8388736.0f;
  }
};

template <>
struct EightBits<Float8> {
  static constexpr float kLimit = 448.0f;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  static __device__ __forceinline__ unsigned narrow(float q) { return __nv_cvt_float_to_fp8(q, __NV_SATFINITE, __NV_E4M3); }

  static __device__ __forceinline__ std::uint32_t narrow4(const float (&q)[4]) {
    const std::uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(q[0], q[1]), __NV_SATFINITE, __NV_E4M3);
    const std::uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(q[2], q[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
#else
  // Devices before 8.9 have no instruction for it, and CUDA's function goes through 64-bit integers. Here a normal result rounds by an addition
  // to its bits; a subnormal one counts 2^-9, and an addition of 2^14 leaves the count in the last bits.
  static __device__ __forceinline__ unsigned narrow(float q) {
    const std::uint32_t bits = __float_as_uint(q), m = bits & 0x7fffffffu;
    const std::uint32_t normal = min(((m + 0x7ffffu + (m >> 20 & 1u)) >> 20) - (120u << 3), 0x7eu);
    const std::uint32_t subnormal = __float_as_uint(__uint_as_float(m) + 16384.0f) & 0xffu;
    return (bits >> 24 & 0x80u) | (m > 0x7f800000u ? 0x7fu : m < 0x3c800000u ? subnormal : normal);
  }

  static __device__ __forceinline__ std::uint32_t narrow4(const float (&q)[4]) {
    return narrow(q[0]) | narrow(q[1]) << 8 | narrow(q[2]) << 16 | narrow(q[3]) << 24;
  }
#endif

  static __device__ __forceinline__ void widen4(std::uint32_t data, float (&q)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(data >> 16 * i), __NV_E4M3);
      const float2 two = __half22float2(__half2(pair));
      q[2 * i] = two.x;
      q[2 * i + 1] = two.y;
    }
  }
};

// |x| as bits, whose order is that of the magnitudes with infinity and NaN above all numbers: an integer maximum keeps a NaN.
__device__ __forceinline__ std::uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// The scale of a group from the largest of its magnitudes.
template <typename Eight>
__device__ __forceinline__ float group_scale(std::uint32_t largest) {
  return __uint_as_float(largest) / EightBits<Eight>::kLimit;
}

// Four neighbouring values, the first in the lowest byte.
template <typename Eight>
__device__ __forceinline__ std::uint32_t quantize4(const float (&x)[4], float scale) {
  const float divisor = scale == 0.0f ? 1.0f : scale;
  const float q[4] = {x[0] / divisor, x[1] / divisor, x[2] / divisor, x[3] / divisor};
  return EightBits<Eight>::narrow4(q);
}

template <typename Eight>
__device__ __forceinline__ std::uint8_t quantize1(float x, float scale) {
  return static_cast<std::uint8_t>(EightBits<Eight>::narrow(x / (scale == 0.0f ? 1.0f : scale)));
}

template <typename Eight>
__device__ __forceinline__ void dequantize4(std::uint32_t data, float scale, float (&x)[4]) {
  EightBits<Eight>::widen4(data, x);
#pragma unroll
  for (float& value : x) value *= scale;
}

template <typename Eight>
__device__ __forceinline__ float dequantize1(std::uint8_t data, float scale) {
  float x[4];
  dequantize4<Eight>(data, scale, x);
  return x[0];
}

}  // namespace pab
