// The addresses of a token's operands, and how a thread reads its vectors of them.
#pragma once

#include <type_traits>

#include "broadcast_residual_plan.h"
#include "quantize.cuh"
#include "vectors.cuh"

namespace pab {

// A kernel may start before those that it depends on have ended: call this before any access to memory. It also lets the next kernel start.
__device__ __forceinline__ void wait_for_kernels_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// A token's index in the leading dimensions.
struct Place {
  const BroadcastResidualArguments& a;
  unsigned index[kMaxDims];

  __device__ __forceinline__ Place(const BroadcastResidualArguments& arguments, unsigned token) : a(arguments) {
#pragma unroll
    for (int dim = 0; dim < kMaxDims; ++dim) {
      index[dim] = token;
      if (dim + 1 < a.dims) {
        const unsigned size = static_cast<unsigned>(a.sizes[dim]);
        index[dim] = token % size;
        token /= size;
      } else {
        token = 0;
      }
    }
  }

  // In the last block some tokens may not exist: their outermost index is beyond its dimension.
  __device__ __forceinline__ bool exists() const {
    unsigned outermost = index[0];
#pragma unroll
    for (int dim = 1; dim < kMaxDims; ++dim) outermost = dim < a.dims ? index[dim] : outermost;
    return outermost < a.sizes[a.dims - 1];
  }

  template <typename E>
  __device__ __forceinline__ E* row(int operand) const {
    std::int64_t offset = 0;
#pragma unroll
    for (int dim = 0; dim < kMaxDims; ++dim) {
      if (dim < a.dims) offset += index[dim] * a.strides[operand][dim];
    }
    return static_cast<E*>(a.operands[operand]) + offset;
  }
};

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>;

// Whether the k-th channel of a vector exists, where `live` channels, any number, exist from its first on.
// Aligned vectors exist whole or not at all.
template <bool kAligned>
__device__ __forceinline__ bool is_live(int k, int live) {
  return (kAligned ? 0 : k) < live;
}

// Eight neighbouring channels, 0 where one does not exist.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector8<T> read_vector(const T* from, int live) {
  Vector8<T> v = {};
  if constexpr (kAligned) {
    if (live > 0) v = read8(from);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (k < live) v.words[k / kPerWord] |= static_cast<std::uint32_t>(reinterpret_cast<const Bits<T>*>(from)[k]) << k % kPerWord * 16;
    }
  }
  return v;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void write_vector(T* to, int live, const Vector8<T>& v) {
  if constexpr (kAligned) {
    if (live > 0) write8(to, v);
  } else {
    constexpr int kPerWord = 4 / sizeof(T);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (k < live) reinterpret_cast<Bits<T>*>(to)[k] = static_cast<Bits<T>>(v.words[k / kPerWord] >> k % kPerWord * 16);
    }
  }
}

// The same of 8-bit values.
template <bool kAligned>
__device__ __forceinline__ uint2 read_bytes(const std::uint8_t* from, int live) {
  if constexpr (kAligned) return live > 0 ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
  std::uint32_t words[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k < live) words[k / 4] |= static_cast<std::uint32_t>(from[k]) << k % 4 * 8;
  }
  return make_uint2(words[0], words[1]);
}

template <typename Eight>
__device__ __forceinline__ void widen_bytes(uint2 data, float scale, float (&c)[8]) {
  float low[4], high[4];
  dequantize4<Eight>(data.x, scale, low);
  dequantize4<Eight>(data.y, scale, high);
#pragma unroll
  for (int k = 0; k < 4; ++k) c[k] = low[k], c[4 + k] = high[k];
}

// Eight channels of a slot in float32; those of 8 bits lie in the first two words.
template <typename T>
__device__ __forceinline__ void widen_slot(const Vector8<T>& slot, DType dtype, float scale, float (&c)[8]) {
  if (is_activation(dtype)) {
    widen8(slot, c);
  } else if (dtype == DType::kInt8) {
    widen_bytes<std::int8_t>(*reinterpret_cast<const uint2*>(&slot), scale, c);
  } else {
    widen_bytes<Float8>(*reinterpret_cast<const uint2*>(&slot), scale, c);
  }
}

// The sum over a token's threads, in each of them, always in the same order. `partial` has room for a number of each warp.
__device__ __forceinline__ float row_sum(float value, int row_threads, float* partial) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  if (row_threads == kWarp) return value;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < row_threads / kWarp; ++warp) sum += partial[warp];
  return sum;
}

}  // namespace pab
