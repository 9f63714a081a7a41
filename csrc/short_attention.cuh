// Rows of q, k and v inside a warp, and what happens to them before their product. A group is 8 rows of a head, row g of lanes 4g to 4g + 3.
//
// Of each block of 32 channels a lane has 8 neighbours, 16 bytes, as four words of two; where 8 channels are left (D = 72) it has two of
// them. That differs from the order of channels in the fragments of a product (mma.cuh) by a permutation, which does not change q k^T when
// q and k share it: loaded words feed the product unchanged. For v and out, 16 bytes are columns of four products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "short_attention.h"

namespace pab {

constexpr unsigned kAllLanes = 0xffffffffu;

template <int kHeadDim>
struct Channels {
  static constexpr int kBlocks = kHeadDim / 32;
  static constexpr bool kTail = kHeadDim % 32 != 0;
  static constexpr int kPieces = kBlocks + kTail;  // accesses to a row
  static constexpr int kWords = 4 * kBlocks + kTail;
  static_assert(kHeadDim % 32 == 0 || kHeadDim % 32 == 8);

  // Words of a piece; word 4 piece + j of a row is the j-th.
  static constexpr int words(int piece) { return piece < kBlocks ? 4 : 1; }

  // The first of the lane's channels of a piece, and where it lies in a row of halves.
  static __device__ __forceinline__ int channel(int piece) {
    const int t = threadIdx.x % 4;
    return piece < kBlocks ? 32 * piece + 8 * t : 32 * kBlocks + 2 * t;
  }
  static __device__ __forceinline__ int bytes(int piece) { return 2 * channel(piece); }
};

template <typename T>
__device__ __forceinline__ float2 widen(std::uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  } else {
    __half2 pair;
    std::memcpy(&pair, &word, sizeof pair);
    return __half22float2(pair);
  }
}

// Rounded to nearest even.
template <typename T>
__device__ __forceinline__ std::uint32_t narrow(float x, float y) {
  std::uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    std::memcpy(&word, &pair, sizeof word);
  } else {
    const __half2 pair = __floats2half2_rn(x, y);
    std::memcpy(&word, &pair, sizeof word);
  }
  return word;
}

// The lane's words of a piece, from memory.
template <int kHeadDim, typename Words>
__device__ __forceinline__ void load_piece(const void* from, int piece, Words& words) {
  if (piece < Channels<kHeadDim>::kBlocks) {
    const uint4 four = *static_cast<const uint4*>(from);
    words[4 * piece] = four.x;
    words[4 * piece + 1] = four.y;
    words[4 * piece + 2] = four.z;
    words[4 * piece + 3] = four.w;
  } else {
    words[4 * piece] = *static_cast<const std::uint32_t*>(from);
  }
}

template <int kHeadDim, typename Words>
__device__ __forceinline__ void store_piece(void* to, int piece, const Words& words) {
  if (piece < Channels<kHeadDim>::kBlocks) {
    *static_cast<uint4*>(to) = make_uint4(words[4 * piece], words[4 * piece + 1], words[4 * piece + 2], words[4 * piece + 3]);
  } else {
    *static_cast<std::uint32_t*>(to) = words[4 * piece];
  }
}

// Groups of rows, `first_row` the lane's own of the first group; rows from `rows` on are 0.
template <int kHeadDim, int kGroups, int kWords>
__device__ __forceinline__ void load_rows(const char* head, std::int64_t stride, int first_row, int rows,
                                          std::uint32_t (&x)[kGroups][kWords]) {
  using C = Channels<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int row = first_row + 8 * i;
#pragma unroll
    for (int w = 0; w < kWords; ++w) x[i][w] = 0;
    if (row < rows) {
#pragma unroll
      for (int piece = 0; piece < C::kPieces; ++piece) load_piece<kHeadDim>(head + row * stride + C::bytes(piece), piece, x[i]);
    }
  }
}

// Over the four lanes of a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// x = the norm of x, rounded to T; `rstd` is that of the rows for kAcross, `weight` and `bias` those of the head, or null.
template <typename T, int kHeadDim, int kGroups, int kWords>
__device__ __forceinline__ void normalise(std::uint32_t (&x)[kGroups][kWords], NormKind kind, float eps, const char* weight,
                                          const char* bias, float (&rstd)[kGroups]) {
  using C = Channels<kHeadDim>;
  float mean[kGroups] = {}, offset[kGroups];
  if (kind == NormKind::kLayer) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (std::uint32_t word : x[i]) {
        const float2 two = widen<T>(word);
        mean[i] += two.x + two.y;
      }
      mean[i] = row_sum(mean[i]) * (1.0f / kHeadDim);
    }
  }
  if (kind != NormKind::kAcross) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float squares = 0.0f;
#pragma unroll
      for (std::uint32_t word : x[i]) {
        const float2 two = widen<T>(word);
        squares += (two.x - mean[i]) * (two.x - mean[i]) + (two.y - mean[i]) * (two.y - mean[i]);
      }
      rstd[i] = rsqrtf(row_sum(squares) * (1.0f / kHeadDim) + eps);
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) offset[i] = -mean[i] * rstd[i];
#pragma unroll
  for (int piece = 0; piece < C::kPieces; ++piece) {
    std::uint32_t weights[kWords], biases[kWords];
#pragma unroll
    for (int w = 4 * piece; w < 4 * piece + C::words(piece); ++w) {
      weights[w] = narrow<T>(1.0f, 1.0f);
      biases[w] = 0;
    }
    if (weight != nullptr) load_piece<kHeadDim>(weight + C::bytes(piece), piece, weights);
    if (bias != nullptr) load_piece<kHeadDim>(bias + C::bytes(piece), piece, biases);
#pragma unroll
    for (int w = 4 * piece; w < 4 * piece + C::words(piece); ++w) {
      const float2 scale = widen<T>(weights[w]), shift = widen<T>(biases[w]);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const float2 y = widen<T>(x[i][w]);
        x[i][w] = narrow<T>((y.x * rstd[i] + offset[i]) * scale.x + shift.x, (y.y * rstd[i] + offset[i]) * scale.y + shift.y);
      }
    }
  }
}

// The rotary embedding of the rows of one token, by its rows of the tables.
struct Rotation {
  const float* cos;
  const float* sin;
  int half;  // pairs that rotate
  bool interleaved;
};

template <typename T>
__device__ __forceinline__ void turn(std::uint32_t& word, float cosine, float sine) {
  const float2 x = widen<T>(word);
  word = narrow<T>(x.x * cosine - x.y * sine, x.y * cosine + x.x * sine);
}

// Rotates rows of q and k whose pairs are the words, four pairs of the tables at once.
template <typename T, int kHeadDim, int kWords>
__device__ __forceinline__ void rotate_words(std::uint32_t (&q)[kWords], std::uint32_t (&k)[kWords], const Rotation& r) {
  using C = Channels<kHeadDim>;
#pragma unroll
  for (int piece = 0; piece < C::kPieces; ++piece) {
    const int pair = C::channel(piece) / 2;
    if (pair >= r.half) continue;
    if (piece < C::kBlocks) {
      const float4 c = *reinterpret_cast<const float4*>(r.cos + pair), s = *reinterpret_cast<const float4*>(r.sin + pair);
      turn<T>(q[4 * piece], c.x, s.x);
      turn<T>(k[4 * piece], c.x, s.x);
      turn<T>(q[4 * piece + 1], c.y, s.y);
      turn<T>(k[4 * piece + 1], c.y, s.y);
      turn<T>(q[4 * piece + 2], c.z, s.z);
      turn<T>(k[4 * piece + 2], c.z, s.z);
      turn<T>(q[4 * piece + 3], c.w, s.w);
      turn<T>(k[4 * piece + 3], c.w, s.w);
    } else {
      turn<T>(q[4 * piece], r.cos[pair], r.sin[pair]);
      turn<T>(k[4 * piece], r.cos[pair], r.sin[pair]);
    }
  }
}

// Rotates rows of q and k in any pairs, through shared memory, since two lanes may have the channels of a pair. All lanes call it.
template <typename T, int kHeadDim, int kWords>
__device__ __forceinline__ void rotate_pairs(std::uint32_t (&q)[kWords], std::uint32_t (&k)[kWords], const Rotation& r, bool valid,
                                             char* q_row, char* k_row) {
  using C = Channels<kHeadDim>;
#pragma unroll
  for (int piece = 0; piece < C::kPieces; ++piece) {
    store_piece<kHeadDim>(q_row + C::bytes(piece), piece, q);
    store_piece<kHeadDim>(k_row + C::bytes(piece), piece, k);
  }
  __syncwarp();
  if (valid) {
#pragma unroll 1
    for (int pair = threadIdx.x % 4; pair < r.half; pair += 4) {
      const int first = r.interleaved ? 2 * pair : pair, second = r.interleaved ? 2 * pair + 1 : pair + r.half;
      const float cosine = r.cos[pair], sine = r.sin[pair];
#pragma unroll
      for (char* row : {q_row, k_row}) {
        std::uint16_t* halves = reinterpret_cast<std::uint16_t*>(row);
        std::uint32_t word = halves[first] | static_cast<std::uint32_t>(halves[second]) << 16;
        turn<T>(word, cosine, sine);
        halves[first] = static_cast<std::uint16_t>(word);
        halves[second] = static_cast<std::uint16_t>(word >> 16);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int piece = 0; piece < C::kPieces; ++piece) {
    load_piece<kHeadDim>(q_row + C::bytes(piece), piece, q);
    load_piece<kHeadDim>(k_row + C::bytes(piece), piece, k);
  }
  __syncwarp();
}

}  // namespace pab
