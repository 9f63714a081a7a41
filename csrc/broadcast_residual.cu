#include "broadcast_residual.h"

#include "broadcast_residual.cuh"
#include "broadcast_residual_plan.h"
#include "launch.cuh"

namespace pab {
namespace {

constexpr int kApart = kWarp * 8;  // channels between the vectors of a thread

// Without the 1, ptxas limits some kernels to 128 registers and spills.
template <typename T, int kLaneVectors, int kSlotsHeld, bool kAligned>
__global__ void __launch_bounds__(max_block(kLaneVectors), 1)
    broadcast_residual_kernel(const BroadcastResidualArguments a, const int row_threads) {
  constexpr bool kLines = kSlotsHeld == 2;  // a slot and its previous one are held, one term after the other
  const bool warp_rows = row_threads == kWarp;
  const int lane = warp_rows ? threadIdx.x % kWarp : threadIdx.x;
  const Place place(a, warp_rows ? blockIdx.x * kWarpRows + threadIdx.x / kWarp : blockIdx.x);
  wait_for_kernels_before();
  if (!place.exists()) return;

  // A warp has kLaneVectors times 32 neighbouring vectors: those of a thread lie a constant distance apart, and need one address.
  const int channels = static_cast<int>(a.channels);
  const int first = (lane / kWarp * kLaneVectors * kWarp + lane % kWarp) * 8;
  int live[kLaneVectors];  // channels that exist from a vector's first on
#pragma unroll
  for (int v = 0; v < kLaneVectors; ++v) live[v] = channels - first - v * kApart;
  const auto read_row = [&](const T* row, Vector8<T>(&to)[kLaneVectors]) {
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) to[v] = read_vector<kAligned>(row + first + v * kApart, live[v]);
  };

  Vector8<T> x[kLaneVectors];
  read_row(place.row<T>(kX), x);
  Vector8<T> slots[kSlotsHeld][kLaneVectors];
  float slot_scales[kSlotsHeld][kLaneVectors];
  const auto read_slot = [&](int slot, int held) {
    if (is_activation(a.slot_dtypes[slot])) {
      read_row(place.row<T>(kSlots + slot), slots[held]);
    } else {
      const std::uint8_t* row = place.row<std::uint8_t>(kSlots + slot);
      const float* scales = place.row<float>(kSlotScales + slot);
#pragma unroll
      for (int v = 0; v < kLaneVectors; ++v) {
        *reinterpret_cast<uint2*>(&slots[held][v]) = read_bytes<kAligned>(row + first + v * kApart, live[v]);
        slot_scales[held][v] = live[v] > 0 ? scales[first / kSlotGroup + v * (kApart / kSlotGroup)] : 0.0f;
      }
    }
  };

  float sum[kLaneVectors][8];
  // Term i, from the slot that is held there; for a line, the other place holds the previous slot.
  const auto add_term = [&](int i, int held) {
    const bool gated = a.operands[kGates + i] != nullptr;
    Vector8<T> gate[kLaneVectors];
    if (gated) read_row(place.row<T>(kGates + i), gate);
    const bool line = kLines && a.weights[i] != nullptr;
    const float weight = line ? *a.weights[i] : 0.0f;
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) {
      float c[8];
      widen_slot(slots[held][v], a.slot_dtypes[i], slot_scales[held][v], c);
      if (line) {
        float before[8];
        widen_slot(slots[kSlotsHeld - 1][v], a.slot_dtypes[kMaxSlots + i], slot_scales[kSlotsHeld - 1][v], before);
#pragma unroll
        for (int k = 0; k < 8; ++k) c[k] += weight * (c[k] - before[k]);
      }
      float g[8];
      if (gated) widen8(gate[v], g);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[v][k] += gated ? g[k] * c[k] : c[k];
    }
  };

#pragma unroll
  for (int v = 0; v < kLaneVectors; ++v) widen8(x[v], sum[v]);
  if constexpr (kLines) {
    for (int i = 0; i < a.slots; ++i) {
      read_slot(i, 0);
      if (a.weights[i] != nullptr) read_slot(kMaxSlots + i, 1);
      add_term(i, 0);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSlotsHeld; ++i) {
      if (i >= a.slots) break;
      read_slot(i, i);
    }
#pragma unroll
    for (int i = 0; i < kSlotsHeld; ++i) {
      if (i >= a.slots) break;
      add_term(i, i);
    }
  }
#pragma unroll
  for (int v = 0; v < kLaneVectors; ++v) x[v] = narrow8<T>(sum[v]);

  Vector8<T> y_new[kLaneVectors];
  if (a.norm != NormKind::kNone) {
    const bool has_scale = a.operands[kScale] != nullptr, has_shift = a.operands[kShift] != nullptr;
    Vector8<T> scale[kLaneVectors], shift[kLaneVectors];
    if (has_scale) read_row(place.row<T>(kScale), scale);
    if (has_shift) read_row(place.row<T>(kShift), shift);

    __shared__ float partial[2][max_block(kLaneVectors) / kWarp];
    float mean = 0.0f;
    if (a.norm == NormKind::kLayer) {
      float total = 0.0f;
#pragma unroll
      for (int v = 0; v < kLaneVectors; ++v) {
        float y[8];
        widen8(x[v], y);
#pragma unroll
        for (int k = 0; k < 8; ++k) total += y[k];
      }
      mean = row_sum(total, row_threads, partial[0]) / static_cast<float>(a.channels);
    }
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) {
      float y[8];
      widen8(x[v], y);
#pragma unroll
      for (int k = 0; k < 8; ++k) squares += is_live<kAligned>(k, live[v]) ? (y[k] - mean) * (y[k] - mean) : 0.0f;
    }
    const float inverse = rsqrtf(row_sum(squares, row_threads, partial[1]) / static_cast<float>(a.channels) + a.eps);

#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) {
      float y[8], by[8];
      widen8(x[v], y);
#pragma unroll
      for (int k = 0; k < 8; ++k) y[k] = (y[k] - mean) * inverse;
      if (a.norm_weight != nullptr) {  // the same for every token: cached, so not worth registers earlier
        widen8(read_vector<kAligned>(static_cast<const T*>(a.norm_weight) + first + v * kApart, live[v]), by);
#pragma unroll
        for (int k = 0; k < 8; ++k) y[k] *= by[k];
      }
      if (a.norm_bias != nullptr) {
        widen8(read_vector<kAligned>(static_cast<const T*>(a.norm_bias) + first + v * kApart, live[v]), by);
#pragma unroll
        for (int k = 0; k < 8; ++k) y[k] += by[k];
      }
      if (has_scale) {
        widen8(scale[v], by);
#pragma unroll
        for (int k = 0; k < 8; ++k) y[k] *= 1.0f + by[k];
      }
      if (has_shift) {
        widen8(shift[v], by);
#pragma unroll
        for (int k = 0; k < 8; ++k) y[k] += by[k];
      }
      y_new[v] = narrow8<T>(y);
    }
  }

  if (a.operands[kXOut] != nullptr) {
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) write_vector<kAligned>(place.row<T>(kXOut) + first + v * kApart, live[v], x[v]);
  }
  if (a.norm != NormKind::kNone) {
#pragma unroll
    for (int v = 0; v < kLaneVectors; ++v) write_vector<kAligned>(place.row<T>(kYOut) + first + v * kApart, live[v], y_new[v]);
  }
}

using Kernel = void (*)(BroadcastResidualArguments, int);

// The instance that holds the fewest slots, but enough.
template <typename T, int kLaneVectors, bool kAligned>
Kernel with_slots(int slots, bool lines) {
  if (lines) return broadcast_residual_kernel<T, kLaneVectors, 2, kAligned>;
  if (slots == 1) return broadcast_residual_kernel<T, kLaneVectors, 1, kAligned>;
  return broadcast_residual_kernel<T, kLaneVectors, 3, kAligned>;
}

template <typename T>
Kernel choose_kernel(const BroadcastResidualPlan& plan, int slots, bool lines) {
  if (plan.vector_bytes < 16) return lines ? broadcast_residual_kernel<T, 2, 2, false> : broadcast_residual_kernel<T, 2, 3, false>;
  if constexpr (sizeof(T) == 4) {
    return with_slots<T, 2, true>(slots, lines);
  } else {
    switch (plan.lane_vectors) {
      case 1: return with_slots<T, 1, true>(slots, lines);
      case 3: return with_slots<T, 3, true>(slots, lines);
      case 4: return with_slots<T, 4, true>(slots, lines);
      default: return with_slots<T, 5, true>(slots, lines);
    }
  }
}

}  // namespace
}  // namespace pab

extern "C" int pab_broadcast_residual(const pab::BroadcastResidualArguments* a, void* stream) {
  using namespace pab;
  const BroadcastResidualPlan plan = plan_broadcast_residual(*a);
  bool lines = false;
  for (int i = 0; i < kMaxSlots; ++i) lines |= a->weights[i] != nullptr;
  const Kernel kernel = a->dtype == DType::kFloat32   ? choose_kernel<float>(plan, a->slots, lines)
                        : a->dtype == DType::kFloat16 ? choose_kernel<__half>(plan, a->slots, lines)
                                                      : choose_kernel<__nv_bfloat16>(plan, a->slots, lines);
  return launch_kernel(kernel, plan, stream, *a, plan.row_threads);
}
