#include "broadcast_residual_plan.h"

namespace pab {
namespace {

const char* refuse(const BroadcastResidualArguments& a) {
  if (!is_activation(a.dtype)) return "activations are float32, float16 or bfloat16";
  if (a.channels < 1 || a.channels > kMaxChannels) return "1 to 8192 channels are supported";
  if (a.slots < 0 || a.slots > kMaxSlots) return "up to 3 slots are supported";
  for (int i = 0; i < a.slots; ++i) {
    if ((a.weights[i] == nullptr) != (a.operands[kBefore + i] == nullptr)) return "a line has a weight and a slot before the newest";
    for (int slot = i; slot < 2 * kMaxSlots; slot += kMaxSlots) {
      if (slot != i && a.operands[kSlots + slot] == nullptr) continue;  // not a line: there is no previous slot
      if (is_activation(a.slot_dtypes[slot])) {
        if (a.slot_dtypes[slot] != a.dtype) return "a slot has the dtype of the activations, or is int8 or float8_e4m3fn";
      } else if (a.operands[kSlotScales + slot] == nullptr) {
        return "a slot of 8 bits has scales";
      }
    }
  }
  if (a.dims < 1 || a.dims > kMaxDims) return "1 to 4 leading dimensions are supported";
  return nullptr;
}

// Whether 8 channels of every token can be read or written at once, in this and every other operand.
bool all_aligned(const BroadcastResidualArguments& a) {
  if (a.channels % 8 != 0) return false;
  for (int operand = kX; operand < kSlotScales; ++operand) {
    if (a.operands[operand] == nullptr) continue;
    const bool is_slot = operand >= kSlots && operand < kGates;
    const int size = size_of(is_slot ? a.slot_dtypes[operand - kSlots] : a.dtype), bytes = size == 1 ? 8 : 16;
    if (!is_aligned(a.operands[operand], bytes)) return false;
    for (int dim = 0; dim < a.dims; ++dim) {
      if (((a.strides[operand][dim] * size) & (bytes - 1)) != 0) return false;
    }
  }
  return is_aligned(a.norm_weight, 16) && is_aligned(a.norm_bias, 16);
}

// The vectors of a thread, among those with a kernel, that leave the fewest idle; among equals, with the fewest registers.
int choose_lane_vectors(std::int64_t vectors, DType dtype, bool aligned) {
  if (!aligned || dtype == DType::kFloat32) return 2;
  if (vectors <= 2 * kWarp) return 1;
  int best = 3;
  for (int lane_vectors = 4; lane_vectors <= 5; ++lane_vectors) {
    if (row_threads_of(vectors, lane_vectors) * lane_vectors < row_threads_of(vectors, best) * best) best = lane_vectors;
  }
  return best;
}

}  // namespace

bool append_dimension(BroadcastResidualArguments& a, std::int64_t size, const std::int64_t (&strides)[kOperands]) {
  if (size == 1) return true;
  bool joins = a.dims > 0;
  for (int operand = 0; joins && operand < kOperands; ++operand) {
    joins = strides[operand] == a.sizes[a.dims - 1] * a.strides[operand][a.dims - 1];
  }
  if (joins) {
    a.sizes[a.dims - 1] *= size;
    return true;
  }
  if (a.dims == kMaxDims) return false;
  for (int operand = 0; operand < kOperands; ++operand) a.strides[operand][a.dims] = strides[operand];
  a.sizes[a.dims++] = size;
  return true;
}

BroadcastResidualPlan plan_broadcast_residual(const BroadcastResidualArguments& a) {
  BroadcastResidualPlan plan;
  plan.refusal = refuse(a);
  if (plan.refusal != nullptr) return plan;
  std::int64_t tokens = 1;
  for (int dim = 0; dim < a.dims; ++dim) {
    if (a.sizes[dim] < 0 || (a.sizes[dim] > 0 && tokens > (kMaxGridX - kWarpRows) / a.sizes[dim])) {
      plan.refusal = "fewer than 2^31 - 4 tokens are supported";
      return plan;
    }
    tokens *= a.sizes[dim];
  }
  const bool aligned = all_aligned(a);
  const std::int64_t vectors = ceil_div(a.channels, 8);
  plan.lane_vectors = choose_lane_vectors(vectors, a.dtype, aligned);
  plan.row_threads = row_threads_of(vectors, plan.lane_vectors);
  const int rows = plan.row_threads == kWarp ? kWarpRows : 1;
  plan.grid[0] = static_cast<unsigned>(ceil_div(tokens, rows));
  plan.block = static_cast<unsigned>(rows * plan.row_threads);
  plan.waits = true;
  plan.vector_bytes = aligned ? 16 : size_of(a.dtype);
  return plan;
}

}  // namespace pab
