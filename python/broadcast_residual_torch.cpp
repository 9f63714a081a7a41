// torch.ops.pab_kernels_cuda.broadcast_residual, whose schema is in pab_kernels/ops/broadcast_residual/cuda.py.
#include "../csrc/broadcast_residual.h"

#include "../csrc/broadcast_residual_plan.h"
#include "torch_tensor.h"

namespace pab {
namespace {

using MaybeTensor = std::optional<Tensor>;

// The tensors of a call, of which arguments are made.
struct Call {
  BroadcastResidualArguments arguments{};
  int64_t leading;  // dimensions of x before the channels
  torch::headeronly::IntHeaderOnlyArrayRef sizes[kOperands], strides[kOperands];

  explicit Call(const Tensor& x) : leading(x.dim() - 1) {
    set(kX, x);
    arguments.dtype = dtype_of(x);
    arguments.channels = sizes[kX][leading];
  }

  void set(int operand, const Tensor& t) {
    arguments.operands[operand] = t.mutable_data_ptr();
    sizes[operand] = t.sizes();
    strides[operand] = t.strides();
  }

  void set(int operand, const MaybeTensor& t) {
    if (t) set(operand, *t);
  }

  void add_slot(const MaybeTensor& slot, const MaybeTensor& scale, const MaybeTensor& gate, const MaybeTensor& weight) {
    if (!slot) return;
    const int i = arguments.slots++;
    set(kSlots + i, *slot);
    set(kSlotScales + i, scale);
    set(kGates + i, gate);
    arguments.slot_dtypes[i] = dtype_of(*slot);
    if (weight) arguments.weights[i] = static_cast<const float*>(weight->const_data_ptr());
  }

  // Once all operands are set: the leading dimensions. An operand is broadcast along those that it lacks or has once.
  void append_dimensions() {
    for (int64_t outward = 1; outward <= leading; ++outward) {
      int64_t steps[kOperands] = {};
      for (int operand = 0; operand < kOperands; ++operand) {
        const int64_t own = static_cast<int64_t>(sizes[operand].size()) - 1 - outward;
        if (own >= 0 && sizes[operand][own] != 1) steps[operand] = strides[operand][own];
      }
      if (!append_dimension(arguments, sizes[kX][leading - outward], steps)) {
        throw std::runtime_error("broadcast_residual: up to 4 leading dimensions are supported, once what can be joined is");
      }
    }
    if (arguments.dims == 0) arguments.sizes[arguments.dims++] = 1;
  }
};

void broadcast_residual(const Tensor& x, const MaybeTensor& slot_0, const MaybeTensor& slot_scale_0, const MaybeTensor& gate_0,
                        const MaybeTensor& weight_0, const MaybeTensor& slot_1, const MaybeTensor& slot_scale_1, const MaybeTensor& gate_1,
                        const MaybeTensor& weight_1, const MaybeTensor& slot_2, const MaybeTensor& slot_scale_2, const MaybeTensor& gate_2,
                        const MaybeTensor& weight_2, int64_t norm, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps,
                        const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& x_out, const MaybeTensor& y_out) {
  Call call(x);
  call.add_slot(slot_0, slot_scale_0, gate_0, weight_0);
  call.add_slot(slot_1, slot_scale_1, gate_1, weight_1);
  call.add_slot(slot_2, slot_scale_2, gate_2, weight_2);
  call.set(kShift, shift);
  call.set(kScale, scale);
  call.set(kXOut, x_out);
  call.set(kYOut, y_out);
  call.append_dimensions();
  BroadcastResidualArguments& a = call.arguments;
  a.norm = static_cast<NormKind>(norm);
  if (norm_weight) a.norm_weight = norm_weight->const_data_ptr();
  if (norm_bias) a.norm_bias = norm_bias->const_data_ptr();
  a.eps = static_cast<float>(eps);
  launch_on(x, "broadcast_residual", plan_broadcast_residual(a).refusal, [&](void* stream) { return pab_broadcast_residual(&a, stream); });
}

}  // namespace
}  // namespace pab

STABLE_TORCH_LIBRARY_IMPL(pab_kernels_cuda, CUDA, library) { library.impl("broadcast_residual", TORCH_BOX(&pab::broadcast_residual)); }
