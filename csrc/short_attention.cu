#include "short_attention.h"

#include <type_traits>

#include "launch.cuh"
#include "mma.cuh"
#include "quantize.cuh"
#include "short_attention.cuh"
#include "short_attention_plan.h"

namespace pab {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

namespace {

__device__ __forceinline__ std::int64_t offset_of(const HeadStrides& s, unsigned first, unsigned second, unsigned head) {
  return first * s.first + second * s.second + head * s.head;
}

// A row of out in 8 bits, of which lanes have the words: its scale, and its channels.
template <typename Eight, typename T, int kHeadDim, int kWords>
__device__ __forceinline__ void store_quantized(std::uint8_t* row, float* scale_at, bool valid, const std::uint32_t (&out)[kWords]) {
  using C = Channels<kHeadDim>;
  std::uint32_t largest = 0;
#pragma unroll
  for (std::uint32_t word : out) {
    const float2 two = widen<T>(word);
    largest = max(largest, max(magnitude(two.x), magnitude(two.y)));
  }
  largest = max(largest, __shfl_xor_sync(kWarp, largest, 1));
  largest = max(largest, __shfl_xor_sync(kWarp, largest, 2));
  if (!valid) return;
  const float scale = group_scale<Eight>(largest);
  if (threadIdx.x % 4 == 0) *scale_at = scale;
#pragma unroll
  for (int piece = 0; piece < C::kPieces; ++piece) {
    std::uint32_t eight[2];
#pragma unroll
    for (int half = 0; half < (C::words(piece) + 1) / 2; ++half) {
      const float2 low = widen<T>(out[4 * piece + 2 * half]);
      const float2 high = C::words(piece) > 1 ? widen<T>(out[4 * piece + 2 * half + 1]) : make_float2(0.0f, 0.0f);
      const float four[4] = {low.x, low.y, high.x, high.y};
      eight[half] = quantize4<Eight>(four, scale);
    }
    std::uint8_t* to = row + C::channel(piece);
    if (piece < C::kBlocks) {
      *reinterpret_cast<uint2*>(to) = make_uint2(eight[0], eight[1]);
    } else {
      *reinterpret_cast<std::uint16_t*>(to) = static_cast<std::uint16_t>(eight[0]);
    }
  }
}

// A warp has 8 kGroups rows of a head of a sequence: all, where kWarps is 1; where it is 4, it prepares its rows of k and v for all four.
//   1. q' = rope(q_norm(q));  k' = rope(k_norm(k)), each rounded to T
//   2. s = scale q' k'^T;  p = 2^(s - max s);  l = sum p, of p before it is rounded to T
//   3. out = p v / l, rounded;  stored = out, quantised from the rounded
template <typename T, int kHeadDim, int kGroups, int kWarps>
__global__ void __launch_bounds__(32 * kShortAttentionWarps) short_attention_kernel(const __grid_constant__ ShortAttentionArguments a) {
  using C = Channels<kHeadDim>;
  constexpr int kWords = C::kWords, kTiles = kGroups / 2, kKeyGroups = kGroups * kWarps;
  constexpr int kRowStride = short_attention_row_stride(kHeadDim), kGroupBytes = 8 * 2 * kHeadDim;
  constexpr int kWarpBytes = short_attention_warp_bytes(8 * kKeyGroups, kHeadDim);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const unsigned heads = static_cast<unsigned>(a.heads);
  const unsigned place = kWarps == 1 ? blockIdx.x * kShortAttentionWarps + warp : blockIdx.x;
  const unsigned head = place % heads, sequence = place / heads;
  if (sequence >= a.sequences) return;
  const unsigned first = sequence / static_cast<unsigned>(a.batch), second = sequence % static_cast<unsigned>(a.batch);
  const int rows = static_cast<int>(a.tokens), row = (kWarps == 1 ? 0 : warp * 8 * kGroups) + lane / 4;  // the lane's first

  const auto head_of = [&](const void* x, const HeadStrides& strides) {
    return static_cast<const char*>(x) + 2 * offset_of(strides, first, second, head);
  };
  std::uint32_t q[kGroups][kWords], k[kGroups][kWords], v[kGroups][kWords];
  load_rows<kHeadDim>(head_of(a.q, a.q_strides), 2 * a.q_strides.token, row, rows, q);
  load_rows<kHeadDim>(head_of(a.k, a.k_strides), 2 * a.k_strides.token, row, rows, k);
  if constexpr (kGroups == 2) load_rows<kHeadDim>(head_of(a.v, a.v_strides), 2 * a.v_strides.token, row, rows, v);

  const auto norm = [&](const QKNormArguments& n, std::uint32_t (&x)[kGroups][kWords]) {
    if (n.kind == NormKind::kNone) return;
    float rstd[kGroups];
    const std::int64_t at = offset_of(n.rstd_strides, first, second, 0);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      rstd[i] = n.kind == NormKind::kAcross && row + 8 * i < rows ? n.rstd[at + (row + 8 * i) * n.rstd_strides.token] : 0.0f;
    }
    const std::int64_t channels = n.kind == NormKind::kAcross ? 2 * kHeadDim * static_cast<std::int64_t>(head) : 0;
    const char* weight = n.weight == nullptr ? nullptr : static_cast<const char*>(n.weight) + channels;
    normalise<T, kHeadDim>(x, n.kind, n.eps, weight, static_cast<const char*>(n.bias), rstd);
  };
  norm(a.q_norm, q);
  norm(a.k_norm, k);

  if (a.rotary > 0) {
    char* q_row = reinterpret_cast<char*>(dynamic_shared) + warp * kWarpBytes + lane / 4 * 2 * kRowStride;
    const int half = static_cast<int>(a.rotary) / 2;
    const bool words = short_attention_rotates_words(a.rotary, a.interleaved);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int token = row + 8 * i;
      const Rotation rotation{a.cos + token * half, a.sin + token * half, half, a.interleaved};
      if (!words) {
        rotate_pairs<T, kHeadDim>(q[i], k[i], rotation, token < rows, q_row, q_row + 8 * 2 * kRowStride);
      } else if (token < rows) {
        rotate_words<T, kHeadDim>(q[i], k[i], rotation);
      }
    }
  }

  // The groups of k (0) and v (1) in shared memory: a lane's words are where the same lane of another warp looks for them.
  const auto shared = [&](int which, int group, int piece) {
    char* of_warp = reinterpret_cast<char*>(dynamic_shared) + group / kGroups * kWarpBytes;
    return of_warp + (which * kGroups + group % kGroups) * kGroupBytes + 512 * piece + (piece < C::kBlocks ? 16 : 4) * lane;
  };
  if constexpr (kWarps > 1) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int piece = 0; piece < C::kPieces; ++piece) {
        store_piece<kHeadDim>(shared(0, warp * kGroups + i, piece), piece, k[i]);
        store_piece<kHeadDim>(shared(1, warp * kGroups + i, piece), piece, v[i]);
      }
    }
    __syncthreads();
    if (warp * 8 * kGroups >= rows) return;
  }

  float s[kTiles][kKeyGroups][4];
#pragma unroll
  for (int n = 0; n < kKeyGroups; ++n) {
    std::uint32_t key[kWords];
#pragma unroll
    for (int piece = 0; piece < C::kPieces; ++piece) {
      if constexpr (kWarps > 1) {
        load_piece<kHeadDim>(shared(0, n, piece), piece, key);
      } else {
#pragma unroll
        for (int w = 4 * piece; w < 4 * piece + C::words(piece); ++w) key[w] = k[n][w];
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (float& score : s[m][n]) score = 0.0f;
#pragma unroll
      for (int w = 0; w + 1 < kWords; w += 2) {
        const std::uint32_t left[4] = {q[2 * m][w], q[2 * m + 1][w], q[2 * m][w + 1], q[2 * m + 1][w + 1]};
        const std::uint32_t right[2] = {key[w], key[w + 1]};
        mma_m16n8k16<T>(s[m][n], left, right);
      }
      if constexpr (C::kTail) {
        const std::uint32_t left[2] = {q[2 * m][kWords - 1], q[2 * m + 1][kWords - 1]};
        const std::uint32_t right[1] = {key[kWords - 1]};
        mma_m16n8k8<T>(s[m][n], left, right);
      }
    }
  }
  if constexpr (kGroups > 2) load_rows<kHeadDim>(head_of(a.v, a.v_strides), 2 * a.v_strides.token, row, rows, v);

  std::uint32_t p[kTiles][kKeyGroups][2];  // of the rows g and g + 8
  float share[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[m][n][2 * half + i];
          score = 8 * n + 2 * t + i < rows ? score * a.scale : -INFINITY;
          largest = fmaxf(largest, score);
        }
      }
      largest = row_max(largest);
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n) {
        const float x = exp2f(s[m][n][2 * half] - largest), y = exp2f(s[m][n][2 * half + 1] - largest);
        sum += x + y;
        p[m][n][half] = narrow<T>(x, y);
      }
      share[m][half] = __fdividef(1.0f, row_sum(sum));  // a sum is 1 to 64
    }
  }

  std::uint32_t out[kGroups][kWords];
#pragma unroll
  for (int piece = 0; piece < C::kPieces; ++piece) {
    std::uint32_t value[kKeyGroups][kWords];
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
      if constexpr (kWarps > 1) {
        load_piece<kHeadDim>(shared(1, n, piece), piece, value[n]);
      } else {
#pragma unroll
        for (int w = 4 * piece; w < 4 * piece + C::words(piece); ++w) value[n][w] = v[n][w];
      }
    }
#pragma unroll
    for (int w = 4 * piece; w < 4 * piece + C::words(piece); ++w) {
      float sum[kTiles][4] = {};
#pragma unroll
      for (int n = 0; n < kKeyGroups; n += 2) {
        const std::uint32_t right[2] = {movmatrix_trans(value[n][w]), movmatrix_trans(value[n + 1][w])};
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const std::uint32_t left[4] = {p[m][n][0], p[m][n][1], p[m][n + 1][0], p[m][n + 1][1]};
          mma_m16n8k16<T>(sum[m], left, right);
        }
      }
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const float of_row = share[i / 2][i % 2];
        out[i][w] = narrow<T>(sum[i / 2][i % 2 * 2] * of_row, sum[i / 2][i % 2 * 2 + 1] * of_row);
      }
    }
  }

  const auto store = [&](void* to, const HeadStrides& strides) {
    char* at = static_cast<char*>(to) + 2 * offset_of(strides, first, second, head);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (row + 8 * i >= rows) continue;
#pragma unroll
      for (int piece = 0; piece < C::kPieces; ++piece) {
        store_piece<kHeadDim>(at + 2 * (row + 8 * i) * strides.token + C::bytes(piece), piece, out[i]);
      }
    }
  };
  store(a.out, a.out_strides);
  if (a.stored == nullptr) return;
  if (a.stored_dtype == a.dtype) {
    store(a.stored, a.stored_strides);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const bool valid = row + 8 * i < rows;
    std::uint8_t* to = static_cast<std::uint8_t*>(a.stored) + offset_of(a.stored_strides, first, second, head);
    to += (row + 8 * i) * a.stored_strides.token;
    float* scale = a.stored_scale + offset_of(a.stored_scale_strides, first, second, head) + (row + 8 * i) * a.stored_scale_strides.token;
    if (a.stored_dtype == DType::kInt8) {
      store_quantized<std::int8_t, T, kHeadDim>(to, scale, valid, out[i]);
    } else {
      store_quantized<Float8, T, kHeadDim>(to, scale, valid, out[i]);
    }
  }
}

template <typename T, int kHeadDim>
auto kernel_of(std::int64_t tokens) {
  const int rows = short_attention_rows(tokens);
  return rows == 16   ? short_attention_kernel<T, kHeadDim, 2, 1>
         : rows == 32 ? short_attention_kernel<T, kHeadDim, 4, 1>
                      : short_attention_kernel<T, kHeadDim, 2, kShortAttentionWarps>;
}

template <typename T>
auto kernel_of(std::int64_t tokens, std::int64_t head_dim) {
  switch (head_dim) {
    case 64: return kernel_of<T, 64>(tokens);
    case 72: return kernel_of<T, 72>(tokens);
    case 96: return kernel_of<T, 96>(tokens);
    default: return kernel_of<T, 128>(tokens);
  }
}

}  // namespace
}  // namespace pab

extern "C" int pab_short_attention(const pab::ShortAttentionArguments* a, void* stream) {
  using namespace pab;
  const LaunchPlan plan = plan_short_attention(*a);
  const bool half = a->dtype == DType::kFloat16;
  return launch_kernel(half ? kernel_of<__half>(a->tokens, a->head_dim) : kernel_of<__nv_bfloat16>(a->tokens, a->head_dim), plan, stream, *a);
}
