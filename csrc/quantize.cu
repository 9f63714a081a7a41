#include "quantize.h"

#include <type_traits>

#include "launch.cuh"
#include "quantize.cuh"
#include "quantize_plan.h"
#include "vectors.cuh"

namespace pab {
namespace {

// Eight channels of a lane: neighbours where they can be read at once, else a team's stride apart.
template <bool kVectors>
__device__ __forceinline__ int channel(int lane, int i) {
  return kVectors ? lane * kLaneChannels + i : i * kTeam + lane;
}

template <typename T, typename Eight, bool kVectors>
__global__ void __launch_bounds__(kQuantizeBlock) quantize_kernel(QuantizeArguments a) {
  const int lane = threadIdx.x % kTeam;
  const unsigned groups = static_cast<unsigned>(ceil_div(a.channels, a.group));
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlockGroups + threadIdx.x / kTeam;

  std::int64_t row[kTeamGroups];
  unsigned index[kTeamGroups];
  int channels[kTeamGroups];  // that the group has: 0 beyond the last group, fewer than a.group in a row's last one
  float x[kTeamGroups][kLaneChannels];
#pragma unroll
  for (int g = 0; g < kTeamGroups; ++g) {
    const std::int64_t place = first + g * (kQuantizeBlock / kTeam);
    row[g] = static_cast<unsigned>(place) / groups;
    index[g] = static_cast<unsigned>(place) % groups;
    channels[g] = row[g] < a.rows ? static_cast<int>(min(a.group, a.channels - index[g] * a.group)) : 0;
    const T* from = static_cast<const T*>(a.x) + row[g] * a.x_stride + index[g] * a.group;
    if constexpr (kVectors) {
      if (channel<true>(lane, 0) < channels[g]) {
        load8(from + channel<true>(lane, 0), x[g]);
      } else {
#pragma unroll
        for (float& value : x[g]) value = 0.0f;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const int c = channel<false>(lane, i);
        x[g][i] = c < channels[g] ? to_float(from[c]) : 0.0f;
      }
    }
  }

#pragma unroll
  for (int g = 0; g < kTeamGroups; ++g) {
    std::uint32_t largest = 0;
#pragma unroll
    for (float value : x[g]) largest = max(largest, magnitude(value));
#pragma unroll
    for (int apart = kTeam / 2; apart > 0; apart /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
    const float scale = group_scale<Eight>(largest);
    if (lane == 0 && channels[g] > 0) a.scale[row[g] * a.scale_stride + index[g]] = scale;

    std::uint8_t* to = static_cast<std::uint8_t*>(a.data) + row[g] * a.data_stride + index[g] * a.group;
    if constexpr (kVectors) {
      if (channel<true>(lane, 0) < channels[g]) {
        const float low[4] = {x[g][0], x[g][1], x[g][2], x[g][3]}, high[4] = {x[g][4], x[g][5], x[g][6], x[g][7]};
        *reinterpret_cast<uint2*>(to + channel<true>(lane, 0)) = make_uint2(quantize4<Eight>(low, scale), quantize4<Eight>(high, scale));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
        const int c = channel<false>(lane, i);
        if (c < channels[g]) to[c] = quantize1<Eight>(x[g][i], scale);
      }
    }
  }
}

template <typename Eight, typename T, bool kVectors>
__global__ void __launch_bounds__(kDequantizeBlock) dequantize_kernel(DequantizeArguments a) {
  constexpr int kWidth = kVectors ? kLaneChannels : 1;
  const unsigned pieces = static_cast<unsigned>(a.channels / kWidth);
  const unsigned first = blockIdx.x * (kDequantizeBlock * kThreadVectors) + threadIdx.x;

  std::int64_t row[kThreadVectors];
  std::int64_t begin[kThreadVectors];
  float scale[kThreadVectors];
  uint2 data[kThreadVectors];
#pragma unroll
  for (int v = 0; v < kThreadVectors; ++v) {
    const unsigned place = first + v * kDequantizeBlock;
    row[v] = place / pieces;
    begin[v] = static_cast<std::int64_t>(place % pieces) * kWidth;
    if (row[v] >= a.rows) continue;
    const std::uint8_t* from = static_cast<const std::uint8_t*>(a.data) + row[v] * a.data_stride + begin[v];
    scale[v] = a.scale[row[v] * a.scale_stride + static_cast<unsigned>(begin[v]) / static_cast<unsigned>(a.group)];
    if constexpr (kVectors) {
      data[v] = *reinterpret_cast<const uint2*>(from);
    } else {
      data[v].x = *from;
    }
  }
#pragma unroll
  for (int v = 0; v < kThreadVectors; ++v) {
    if (row[v] >= a.rows) continue;
    T* to = static_cast<T*>(a.out) + row[v] * a.out_stride + begin[v];
    if constexpr (kVectors) {
      float low[4], high[4];
      dequantize4<Eight>(data[v].x, scale[v], low);
      dequantize4<Eight>(data[v].y, scale[v], high);
      store8(to, {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]});
    } else {
      *to = from_float<T>(dequantize1<Eight>(static_cast<std::uint8_t>(data[v].x), scale[v]));
    }
  }
}

// Calls `chosen` with a null pointer to each of the two types.
template <typename Chosen>
int with_types(DType activation, DType eight, Chosen chosen) {
  const auto with_activation = [&](auto* x) {
    return eight == DType::kInt8 ? chosen(x, static_cast<std::int8_t*>(nullptr)) : chosen(x, static_cast<Float8*>(nullptr));
  };
  switch (activation) {
    case DType::kFloat32: return with_activation(static_cast<float*>(nullptr));
    case DType::kFloat16: return with_activation(static_cast<__half*>(nullptr));
    default: return with_activation(static_cast<__nv_bfloat16*>(nullptr));
  }
}

}  // namespace
}  // namespace pab

extern "C" int pab_quantize(const pab::QuantizeArguments* a, void* stream) {
  using namespace pab;
  const LaunchPlan plan = plan_quantize(*a);
  return with_types(a->x_dtype, a->data_dtype, [&](auto* x, auto* data) {
    using T = std::remove_pointer_t<decltype(x)>;
    using Eight = std::remove_pointer_t<decltype(data)>;
    const auto kernel = plan.vector_bytes == 16 ? quantize_kernel<T, Eight, true> : quantize_kernel<T, Eight, false>;
    return launch_kernel(kernel, plan, stream, *a);
  });
}

extern "C" int pab_dequantize(const pab::DequantizeArguments* a, void* stream) {
  using namespace pab;
  const LaunchPlan plan = plan_dequantize(*a);
  return with_types(a->out_dtype, a->data_dtype, [&](auto* out, auto* data) {
    using T = std::remove_pointer_t<decltype(out)>;
    using Eight = std::remove_pointer_t<decltype(data)>;
    const auto kernel = plan.vector_bytes == 16 ? dequantize_kernel<Eight, T, true> : dequantize_kernel<Eight, T, false>;
    return launch_kernel(kernel, plan, stream, *a);
  });
}
