#include "host.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, module) {
  module.doc() = "How the CUDA kernels are launched: the planners, in plain C++. No GPU is needed.";

  py::enum_<pab::DType>(module, "DType")
      .value("float32", pab::DType::kFloat32)
      .value("float16", pab::DType::kFloat16)
      .value("bfloat16", pab::DType::kBFloat16)
      .value("int8", pab::DType::kInt8)
      .value("float8_e4m3fn", pab::DType::kFloat8E4M3);

  py::class_<pab::LaunchPlan>(module, "LaunchPlan")
      .def_property_readonly("grid", [](const pab::LaunchPlan& p) { return py::make_tuple(p.grid[0], p.grid[1], p.grid[2]); })
      .def_readonly("block", &pab::LaunchPlan::block)
      .def_readonly("shared_bytes", &pab::LaunchPlan::shared_bytes)
      .def_readonly("vector_bytes", &pab::LaunchPlan::vector_bytes)
      .def_property_readonly("refusal", [](const pab::LaunchPlan& p) -> py::object {
        return p.refusal == nullptr ? py::none() : py::object(py::str(p.refusal));
      });

  pab::bind_broadcast_residual(module);
  pab::bind_quantize(module);
  pab::bind_short_attention(module);
}
