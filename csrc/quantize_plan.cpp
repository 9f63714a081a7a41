#include "quantize_plan.h"

namespace pab {
namespace {

const char* refuse(DType activation, DType eight, std::int64_t rows, std::int64_t channels, std::int64_t group) {
  if (!is_activation(activation)) return "activations are float32, float16 or bfloat16";
  if (is_activation(eight)) return "data is int8 or float8_e4m3fn";
  if (rows < 0 || channels < 1) return "rows is at least 0 and channels at least 1";
  if (group < 1) return "group is at least 1";
  return nullptr;
}

// Whether 8 channels of every row can be read or written at once.
bool rows_are_vectors(const void* pointer, std::int64_t stride, DType dtype) {
  const int bytes = is_activation(dtype) ? 16 : 8;
  return is_aligned(pointer, bytes) && stride * size_of(dtype) % bytes == 0;
}

}  // namespace

LaunchPlan plan_quantize(const QuantizeArguments& a) {
  if (const char* why = refuse(a.x_dtype, a.data_dtype, a.rows, a.channels, a.group)) return refused(why);
  if (a.group > kMaxGroup) return refused("groups of up to 128 channels are supported");
  const std::int64_t groups = ceil_div(a.channels, a.group);
  if (a.rows > kMaxGridX / groups) return refused("fewer than 2^31 groups are supported");
  const bool vectors = a.channels % kLaneChannels == 0 && a.group % kLaneChannels == 0 &&
                       rows_are_vectors(a.x, a.x_stride, a.x_dtype) && rows_are_vectors(a.data, a.data_stride, a.data_dtype);
  LaunchPlan plan;
  plan.grid[0] = static_cast<unsigned>(ceil_div(a.rows * groups, kBlockGroups));
  plan.block = kQuantizeBlock;
  plan.vector_bytes = vectors ? 16 : size_of(a.x_dtype);
  return plan;
}

LaunchPlan plan_dequantize(const DequantizeArguments& a) {
  if (const char* why = refuse(a.out_dtype, a.data_dtype, a.rows, a.channels, a.group)) return refused(why);
  const bool vectors = a.channels % kLaneChannels == 0 && a.group % kLaneChannels == 0 &&
                       rows_are_vectors(a.out, a.out_stride, a.out_dtype) && rows_are_vectors(a.data, a.data_stride, a.data_dtype);
  const std::int64_t pieces = a.channels / (vectors ? kLaneChannels : 1);
  if (a.rows > (kMaxGridX - kDequantizeBlock * kThreadVectors) / pieces) return refused("fewer than 2^31 accesses are supported");
  LaunchPlan plan;
  plan.grid[0] = static_cast<unsigned>(ceil_div(a.rows * pieces, kDequantizeBlock * kThreadVectors));
  plan.block = kDequantizeBlock;
  plan.vector_bytes = vectors ? 16 : size_of(a.out_dtype);
  return plan;
}

}  // namespace pab
