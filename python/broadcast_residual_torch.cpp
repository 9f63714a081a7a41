// torch.ops.pab_kernels_cuda.broadcast_residual, broadcast_residual_one and broadcast_residual_lines, whose schemas are in cuda.py of the operation.
// All assumptions of the kernel about a call are checked here once more: a wrong one would write beyond a tensor.
#include "../csrc/broadcast_residual.h"

#include <cmath>

#include "../csrc/broadcast_residual_plan.h"
#include "torch_tensor.h"

namespace pab {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Numbers = torch::headeronly::IntHeaderOnlyArrayRef;

// Dtype and device as torch's numbers: comparing these costs less than converting them.
struct Kind {
  int32_t dtype, device_type, device;

  explicit Kind(const Tensor& t) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device));
  }
};

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("broadcast_residual: ") + what);
}

// The arguments of a launch, made of the tensors of a call.
struct Call {
  const Tensor& x;
  const Kind kind;
  BroadcastResidualArguments arguments{};
  Numbers sizes[kOperands], strides[kOperands];

  explicit Call(const Tensor& x) : x(x), kind(x) {
    arguments.dtype = dtype_of(x);
    place(kX, x);
    arguments.channels = sizes[kX].back();
    require(sizes[kX].size() <= kMaxDims + 1, "up to 5 dimensions are supported");
  }

  // On x's device, in x's dtype or in float32.
  void check_kind(const Tensor& t, bool float32 = false) const {
    const Kind own(t);
    require(own.device_type == kind.device_type && own.device == kind.device, "a tensor is not on x's device");
    const int32_t dtype = float32 ? aoti_torch_dtype_float32() : kind.dtype;
    require(own.dtype == dtype, "a tensor does not have x's dtype, or a scale or weight is not float32");
  }

  void place(int operand, const Tensor& t) {
    sizes[operand] = t.sizes();
    strides[operand] = t.strides();
    require(!sizes[operand].empty(), "a tensor has no dimensions");
    require(strides[operand].back() == 1 || sizes[operand].back() == 1, "a tensor's channels are not neighbours");
    arguments.operands[operand] = const_cast<void*>(t.const_data_ptr());
  }

  // Of x's shape except for the last size.
  void set_same(int operand, const Tensor& t, int64_t last) {
    place(operand, t);
    const Numbers own = sizes[operand], full = sizes[kX];
    bool same = own.size() == full.size() && own.back() == last;
    for (size_t dim = 0; same && dim + 1 < own.size(); ++dim) same = own[dim] == full[dim];
    require(same, "a tensor does not have x's shape");
  }

  void set_broadcast(int operand, const MaybeTensor& t) {
    if (!t) return;
    check_kind(*t);
    place(operand, *t);
    const Numbers own = sizes[operand], full = sizes[kX];
    bool fits = own.size() <= full.size() && own.back() == full.back();
    for (size_t dim = 1; fits && dim < own.size(); ++dim) {
      const int64_t size = own[own.size() - 1 - dim];
      fits = size == 1 || size == full[full.size() - 1 - dim];
    }
    require(fits, "a tensor does not broadcast to x");
  }

  void set_written(int operand, const MaybeTensor& t, bool computed) {
    require(t.has_value() == computed, "a result has no place, or a place no result");
    if (!t) return;
    check_kind(*t);
    set_same(operand, *t, arguments.channels);
    arguments.operands[operand] = t->mutable_data_ptr();
  }

  // The slot of a term or, kMaxSlots further on, the previous one of a line.
  void set_slot(int number, const Tensor& slot, const MaybeTensor& scale) {
    if (scale) {
      const Kind own(slot);
      require(own.device_type == kind.device_type && own.device == kind.device, "a slot is not on x's device");
      arguments.slot_dtypes[number] = dtype_of(slot);
      require(!is_activation(arguments.slot_dtypes[number]), "a slot with scales does not have 8 bits");
      check_kind(*scale, true);
      set_same(kSlotScales + number, *scale, ceil_div(arguments.channels, kSlotGroup));
    } else {
      check_kind(slot);
      arguments.slot_dtypes[number] = arguments.dtype;
    }
    set_same(kSlots + number, slot, arguments.channels);
  }

  void add_slot(const MaybeTensor& slot, const MaybeTensor& scale, const MaybeTensor& gate) {
    if (!slot) return;
    const int i = arguments.slots++;
    set_slot(i, *slot, scale);
    set_broadcast(kGates + i, gate);
  }

  // Makes the last added slot the newest of a line.
  void set_before(const MaybeTensor& before, const MaybeTensor& scale, const MaybeTensor& weight) {
    require(before.has_value() == weight.has_value(), "a line has a slot before the newest and a weight");
    if (!weight) return;
    const int i = arguments.slots - 1;
    set_slot(kMaxSlots + i, *before, scale);
    check_kind(*weight, true);
    require(weight->numel() == 1 && weight->dim() <= 1, "a weight is not one number");
    arguments.weights[i] = static_cast<const float*>(weight->const_data_ptr());
  }

  const void* affine(const MaybeTensor& t) const {
    if (!t) return nullptr;
    check_kind(*t);
    require(t->dim() == 1 && t->size(0) == arguments.channels, "a norm's weight or bias is not [C]");
    require(t->stride(0) == 1 || t->size(0) == 1, "a tensor's channels are not neighbours");
    return t->const_data_ptr();
  }

  // Sets the other arguments, after the slots, and launches.
  void launch(int64_t norm, double eps, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const MaybeTensor& shift,
              const MaybeTensor& scale, const MaybeTensor& x_out, const MaybeTensor& y_out) {
    BroadcastResidualArguments& a = arguments;
    require(norm >= 0 && norm <= 2 && (norm > 0 || a.slots > 0), "there is neither a slot nor a norm");
    require((norm > 0 || (!shift && !scale)) && (norm != 2 || !norm_bias), "a shift or scale without a norm, or a bias of an RMS norm");
    a.norm = static_cast<NormKind>(norm);
    require(std::isfinite(eps) && eps >= 0, "eps is not a finite number from 0 on");
    a.eps = static_cast<float>(eps);
    a.norm_weight = affine(norm_weight);
    a.norm_bias = affine(norm_bias);
    set_broadcast(kShift, shift);
    set_broadcast(kScale, scale);
    set_written(kXOut, x_out, a.slots > 0);
    set_written(kYOut, y_out, a.norm != NormKind::kNone);
    append_dimensions();
    const char* refusal = plan_broadcast_residual(a).refusal;
    launch_on(x, "broadcast_residual", refusal, [&](void* stream) { return pab_broadcast_residual(&a, stream); });
  }

  // An operand is broadcast along leading dimensions that it lacks or in which its size is 1.
  void append_dimensions() {
    const int64_t leading = static_cast<int64_t>(sizes[kX].size()) - 1;
    for (int64_t outward = 1; outward <= leading; ++outward) {
      int64_t steps[kOperands] = {};
      for (int operand = 0; operand < kOperands; ++operand) {
        if (arguments.operands[operand] == nullptr) continue;
        const int64_t own = static_cast<int64_t>(sizes[operand].size()) - 1 - outward;
        if (own >= 0 && sizes[operand][own] != 1) steps[operand] = strides[operand][own];
      }
      require(append_dimension(arguments, sizes[kX][leading - outward], steps), "up to 4 leading dimensions in any order are supported");
    }
    if (arguments.dims == 0) arguments.sizes[arguments.dims++] = 1;
  }
};

void broadcast_residual_one(const Tensor& x, int64_t norm, double eps, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                            const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& x_out, const MaybeTensor& y_out,
                            const MaybeTensor& slot, const MaybeTensor& slot_scale, const MaybeTensor& gate) {
  Call call(x);
  call.add_slot(slot, slot_scale, gate);
  call.launch(norm, eps, norm_weight, norm_bias, shift, scale, x_out, y_out);
}

void broadcast_residual(const Tensor& x, int64_t norm, double eps, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                        const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& x_out, const MaybeTensor& y_out,
                        const MaybeTensor& slot_0, const MaybeTensor& slot_scale_0, const MaybeTensor& gate_0,
                        const MaybeTensor& slot_1, const MaybeTensor& slot_scale_1, const MaybeTensor& gate_1,
                        const MaybeTensor& slot_2, const MaybeTensor& slot_scale_2, const MaybeTensor& gate_2) {
  Call call(x);
  call.add_slot(slot_0, slot_scale_0, gate_0);
  call.add_slot(slot_1, slot_scale_1, gate_1);
  call.add_slot(slot_2, slot_scale_2, gate_2);
  call.launch(norm, eps, norm_weight, norm_bias, shift, scale, x_out, y_out);
}

void broadcast_residual_lines(const Tensor& x, int64_t norm, double eps, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                              const MaybeTensor& shift, const MaybeTensor& scale, const MaybeTensor& x_out, const MaybeTensor& y_out,
                              const MaybeTensor& slot_0, const MaybeTensor& slot_scale_0, const MaybeTensor& gate_0,
                              const MaybeTensor& before_0, const MaybeTensor& before_scale_0, const MaybeTensor& weight_0,
                              const MaybeTensor& slot_1, const MaybeTensor& slot_scale_1, const MaybeTensor& gate_1,
                              const MaybeTensor& before_1, const MaybeTensor& before_scale_1, const MaybeTensor& weight_1,
                              const MaybeTensor& slot_2, const MaybeTensor& slot_scale_2, const MaybeTensor& gate_2,
                              const MaybeTensor& before_2, const MaybeTensor& before_scale_2, const MaybeTensor& weight_2) {
  Call call(x);
  call.add_slot(slot_0, slot_scale_0, gate_0);
  call.set_before(before_0, before_scale_0, weight_0);
  call.add_slot(slot_1, slot_scale_1, gate_1);
  call.set_before(before_1, before_scale_1, weight_1);
  call.add_slot(slot_2, slot_scale_2, gate_2);
  call.set_before(before_2, before_scale_2, weight_2);
  call.launch(norm, eps, norm_weight, norm_bias, shift, scale, x_out, y_out);
}

}  // namespace
}  // namespace pab

STABLE_TORCH_LIBRARY_IMPL(pab_kernels_cuda, CUDA, library) {
  library.impl("broadcast_residual", TORCH_BOX(&pab::broadcast_residual));
  library.impl("broadcast_residual_one", TORCH_BOX(&pab::broadcast_residual_one));
  library.impl("broadcast_residual_lines", TORCH_BOX(&pab::broadcast_residual_lines));
}
