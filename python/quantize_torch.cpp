// torch.ops.pab_kernels_cuda.quantize and dequantize, whose schemas are in pab_kernels/ops/{quantize,dequantize}/cuda.py.
#include "../csrc/quantize.h"

#include "../csrc/quantize_plan.h"
#include "torch_tensor.h"

namespace pab {
namespace {

void quantize(const Tensor& x, int64_t group, const Tensor& data, const Tensor& scale) {
  const QuantizeArguments a{x.const_data_ptr(), data.mutable_data_ptr(), static_cast<float*>(scale.mutable_data_ptr()), x.size(0), x.size(1), group,
                            x.stride(0),        data.stride(0),          scale.stride(0),                               dtype_of(x), dtype_of(data)};
  launch_on(x, "quantize", plan_quantize(a).refusal, [&](void* stream) { return pab_quantize(&a, stream); });
}

void dequantize(const Tensor& data, const Tensor& scale, int64_t group, const Tensor& out) {
  const DequantizeArguments a{data.const_data_ptr(), static_cast<const float*>(scale.const_data_ptr()),
                              out.mutable_data_ptr(), data.size(0), data.size(1), group, data.stride(0), scale.stride(0), out.stride(0),
                              dtype_of(data), dtype_of(out)};
  launch_on(data, "dequantize", plan_dequantize(a).refusal, [&](void* stream) { return pab_dequantize(&a, stream); });
}

}  // namespace
}  // namespace pab

STABLE_TORCH_LIBRARY_IMPL(pab_kernels_cuda, CUDA, library) {
  library.impl("quantize", TORCH_BOX(&pab::quantize));
  library.impl("dequantize", TORCH_BOX(&pab::dequantize));
}
