// torch.ops.pab_kernels_cuda.quantize and dequantize, whose schemas are in pab_kernels/ops/{quantize,dequantize}/cuda.py.
#include "../csrc/quantize.h"

#include "../csrc/quantize_plan.h"
#include "torch_tensor.h"

namespace pab {
namespace {

void quantize(const Tensor& x, int64_t group, const Tensor& data, const Tensor& scale) {
  const Rows from = rows_of(x);
  QuantizeArguments a{};
  a.x = x.const_data_ptr();
  a.data = data.mutable_data_ptr();
  a.scale = static_cast<float*>(scale.mutable_data_ptr());
  a.rows = from.rows;
  a.channels = from.channels;
  a.group = group;
  a.x_stride = from.stride;
  a.data_stride = rows_of(data).stride;
  a.scale_stride = rows_of(scale).stride;
  a.x_dtype = dtype_of(x);
  a.data_dtype = dtype_of(data);
  launch_on(x, "quantize", plan_quantize(a).refusal, [&](void* stream) { return pab_quantize(&a, stream); });
}

void dequantize(const Tensor& data, const Tensor& scale, int64_t group, const Tensor& out) {
  const Rows from = rows_of(data);
  DequantizeArguments a{};
  a.data = data.const_data_ptr();
  a.scale = static_cast<const float*>(scale.const_data_ptr());
  a.out = out.mutable_data_ptr();
  a.rows = from.rows;
  a.channels = from.channels;
  a.group = group;
  a.data_stride = from.stride;
  a.scale_stride = rows_of(scale).stride;
  a.out_stride = rows_of(out).stride;
  a.data_dtype = dtype_of(data);
  a.out_dtype = dtype_of(out);
  launch_on(data, "dequantize", plan_dequantize(a).refusal, [&](void* stream) { return pab_dequantize(&a, stream); });
}

}  // namespace
}  // namespace pab

STABLE_TORCH_LIBRARY_IMPL(pab_kernels_cuda, CUDA, library) {
  library.impl("quantize", TORCH_BOX(&pab::quantize));
  library.impl("dequantize", TORCH_BOX(&pab::dequantize));
}
