#include "../csrc/quantize_plan.h"
#include "host.h"

namespace py = pybind11;
using namespace py::literals;

namespace pab {

void bind_quantize(py::module_& module) {
  module.attr("QUANTIZE_BLOCK_GROUPS") = kBlockGroups;
  module.attr("DEQUANTIZE_BLOCK_PIECES") = kDequantizeBlock * kThreadVectors;
  module.def(
      "plan_quantize",
      [](std::uintptr_t x, std::uintptr_t data, std::int64_t rows, std::int64_t channels, std::int64_t group, std::int64_t x_stride,
         std::int64_t data_stride, DType x_dtype, DType data_dtype) {
        return plan_quantize({address(x), address(data), nullptr, rows, channels, group, x_stride, data_stride, 0, x_dtype, data_dtype});
      },
      "x"_a, "data"_a, "rows"_a, "channels"_a, "group"_a, "x_stride"_a, "data_stride"_a, "x_dtype"_a, "data_dtype"_a,
      "The launch of quantize; x and data are addresses.");
  module.def(
      "plan_dequantize",
      [](std::uintptr_t data, std::uintptr_t out, std::int64_t rows, std::int64_t channels, std::int64_t group, std::int64_t data_stride,
         std::int64_t out_stride, DType data_dtype, DType out_dtype) {
        return plan_dequantize(
            {address(data), nullptr, address(out), rows, channels, group, data_stride, 0, out_stride, data_dtype, out_dtype});
      },
      "data"_a, "out"_a, "rows"_a, "channels"_a, "group"_a, "data_stride"_a, "out_stride"_a, "data_dtype"_a, "out_dtype"_a,
      "The launch of dequantize; data and out are addresses.");
}

}  // namespace pab
