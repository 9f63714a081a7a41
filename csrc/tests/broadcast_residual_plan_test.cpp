#include "../broadcast_residual_plan.h"

#include <cstring>

#include "check.h"

using namespace pab;

namespace {

alignas(16) char memory[64];

BroadcastResidualArguments arguments(std::int64_t tokens, std::int64_t channels) {
  BroadcastResidualArguments a{};
  a.operands[kX] = a.operands[kYOut] = memory;
  a.channels = channels;
  a.dtype = DType::kBFloat16;
  std::int64_t strides[kOperands] = {};
  strides[kX] = strides[kYOut] = channels;
  CHECK(append_dimension(a, tokens, strides));
  return a;
}

}  // namespace

int main() {
  BroadcastResidualPlan plan = plan_broadcast_residual(arguments(9, 1152));
  CHECK(plan.refusal == nullptr && plan.vector_bytes == 16 && plan.lane_vectors == 5 && plan.row_threads == 32);
  CHECK(plan.grid[0] == 3 && plan.block == 128 && plan.waits);  // 4 tokens a block
  plan = plan_broadcast_residual(arguments(9, 2304));
  CHECK(plan.lane_vectors == 3 && plan.row_threads == 96 && plan.grid[0] == 9 && plan.block == 96);
  CHECK(plan_broadcast_residual(arguments(9, 1153)).vector_bytes == 2);
  CHECK(std::strstr(plan_broadcast_residual(arguments(9, 8200)).refusal, "8192"));

  BroadcastResidualArguments a = arguments(9, 1152);
  a.operands[kX] = memory + 2;
  CHECK(plan_broadcast_residual(a).vector_bytes == 2);
  a = arguments(9, 1152);
  a.norm_weight = memory + 8;
  CHECK(plan_broadcast_residual(a).vector_bytes == 2);
  a = arguments(9, 1152);
  a.slots = 1;
  a.slot_dtypes[0] = DType::kInt8;
  a.operands[kSlots] = memory + 8;
  CHECK(std::strstr(plan_broadcast_residual(a).refusal, "scales"));
  a.operands[kSlotScales] = memory;
  CHECK(plan_broadcast_residual(a).vector_bytes == 16);

  a = arguments(9, 1152);
  std::int64_t strides[kOperands] = {};
  strides[kX] = strides[kYOut] = 9 * 1152;
  CHECK(append_dimension(a, 5, strides) && a.dims == 1 && a.sizes[0] == 45);
  strides[kYOut] = 45 * 1152 + 8;
  CHECK(append_dimension(a, 2, strides) && a.dims == 2);
  CHECK(append_dimension(a, 1, strides) && a.dims == 2);
  CHECK(append_dimension(a, 2, strides) && append_dimension(a, 2, strides) && !append_dimension(a, 2, strides));
  return failures();
}
