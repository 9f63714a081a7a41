#include <pybind11/stl.h>

#include "../csrc/broadcast_residual_plan.h"
#include "host.h"

namespace py = pybind11;
using namespace py::literals;

namespace pab {
namespace {

using Strides = std::vector<std::int64_t>;
using Where = std::optional<std::pair<std::uintptr_t, Strides>>;  // address and strides over the leading dimensions, the outermost first

// Joined leading dimensions and the plan. A term is a line where the slot before it has a dtype.
py::tuple plan(const Strides& sizes, std::int64_t channels, DType dtype, const std::vector<DType>& slot_dtypes,
               const std::vector<std::optional<DType>>& before_dtypes, const std::vector<Where>& operands) {
  static const float weight = 0.5f;
  BroadcastResidualArguments a{};
  a.dtype = dtype;
  a.channels = channels;
  a.slots = static_cast<int>(slot_dtypes.size());
  for (std::size_t i = 0; i < slot_dtypes.size() && i < kMaxSlots; ++i) a.slot_dtypes[i] = slot_dtypes[i];
  for (std::size_t i = 0; i < before_dtypes.size() && i < kMaxSlots; ++i) {
    if (!before_dtypes[i]) continue;
    a.slot_dtypes[kMaxSlots + i] = *before_dtypes[i];
    a.weights[i] = &weight;
  }
  if (operands.size() != kOperands) throw py::value_error("an entry for each operand");
  for (int operand = 0; operand < kOperands; ++operand) {
    if (operands[operand]) a.operands[operand] = address(operands[operand]->first);
  }
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    std::int64_t steps[kOperands] = {};
    for (int operand = 0; operand < kOperands; ++operand) {
      if (operands[operand]) steps[operand] = operands[operand]->second.at(dim);
    }
    if (!append_dimension(a, sizes[dim], steps)) return py::make_tuple(py::none(), py::none(), py::none());
  }
  if (a.dims == 0) a.sizes[a.dims++] = 1;
  std::vector<std::int64_t> joined(a.sizes, a.sizes + a.dims);
  std::vector<Strides> strides;
  for (const auto& of_operand : a.strides) strides.emplace_back(of_operand, of_operand + a.dims);
  return py::make_tuple(joined, strides, plan_broadcast_residual(a));
}

}  // namespace

void bind_broadcast_residual(py::module_& module) {
  py::class_<BroadcastResidualPlan, LaunchPlan>(module, "BroadcastResidualPlan")
      .def_readonly("lane_vectors", &BroadcastResidualPlan::lane_vectors)
      .def_readonly("row_threads", &BroadcastResidualPlan::row_threads);
  module.def("broadcast_residual_max_block", &max_block, "lane_vectors"_a,
             "Threads of a block that the kernels with this many vectors a thread are compiled for.");
  module.def("plan_broadcast_residual", &plan, "sizes"_a, "channels"_a, "dtype"_a, "slot_dtypes"_a, "before_dtypes"_a, "operands"_a,
             "The leading dimensions that are left, the innermost first, each operand's strides over them, and the plan; Nones where they "
             "are too many. Operands: x, x_out, y_out, scale, shift, 3 slots, 3 before them, 3 gates, 6 scales of slots: None or address and strides.");
}

}  // namespace pab
