// The operation broadcast_residual: cached outputs added to the residual stream, then a norm and modulation, in one pass over memory.
//   1. x' = x + sum_i gate_i * c_i;  c_i = slot_i or, on a line, slot_i + weight_i * (slot_i - before_i)
//      where a slot of 8 bits is data * scale
//   2. layer: z = (x' - m) / sqrt(mean (x' - m)^2 + eps), m = mean x';  rms: z = x' / sqrt(mean x'^2 + eps)
//   3. y = (norm_weight * z + norm_bias) * (1 + scale) + shift
// Everything is float32; x' rounds once to its dtype, and y, computed from the rounded x', rounds once.
#pragma once

#include "plan.h"

namespace pab {

constexpr int kMaxSlots = 3;
constexpr int kMaxDims = 4;        // leading dimensions, after merging those that all operands traverse alike
constexpr int kSlotGroup = 128;    // channels that share a scale in an 8-bit slot

// Operands over tokens: three each of slots, previous slots of lines, gates, and scales of both kinds of slots.
enum Operand : int {
  kX,
  kXOut,
  kYOut,
  kScale,
  kShift,
  kSlots,
  kBefore = kSlots + kMaxSlots,
  kGates = kBefore + kMaxSlots,
  kSlotScales = kGates + kMaxSlots,
  kBeforeScales = kSlotScales + kMaxSlots,
  kOperands = kBeforeScales + kMaxSlots
};

enum class NormKind : int { kNone, kLayer, kRms };

struct BroadcastResidualArguments {
  void* operands[kOperands];                  // [tokens, channels], scales of slots [tokens, ceil(channels / 128)]; nullptr: absent
  std::int64_t strides[kOperands][kMaxDims];  // elements; 0 where an operand is broadcast
  std::int64_t sizes[kMaxDims];               // of the leading dimensions, the innermost first
  std::int64_t dims;                          // number of leading dimensions, at least 1
  std::int64_t channels;
  const float* weights[kMaxSlots];            // one number for each line; nullptr: no line
  const void* norm_weight;                    // [channels]; nullptr: 1
  const void* norm_bias;                      // [channels]; nullptr: 0
  float eps;
  int slots;
  NormKind norm;
  DType dtype;                                // of all but 8-bit slots and float32 scales and weights
  DType slot_dtypes[2 * kMaxSlots];           // of slots and previous slots: dtype, int8 or float8 e4m3
};

}  // namespace pab

// Launches on `stream` of the current device. A cudaError_t; cudaErrorInvalidValue where the planner refuses.
extern "C" int pab_broadcast_residual(const pab::BroadcastResidualArguments* arguments, void* stream);
