// torch.ops.pab_kernels_cuda.short_attention, whose schema is in pab_kernels/ops/short_attention/cuda.py.
#include "../csrc/short_attention.h"

#include <optional>

#include "../csrc/short_attention_plan.h"
#include "torch_tensor.h"

namespace pab {
namespace {

using Optional = std::optional<Tensor>;

const void* data_of(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// Of `[*batch, N, ...]`, one or two batch dimensions, up to four dimensions: 0 where there is none, or one element.
HeadStrides strides_of(const Tensor& t, bool heads = true) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t tokens = static_cast<int64_t>(sizes.size()) - (heads ? 3 : 1);
  const auto stride = [&](int64_t dim) { return dim < 0 || sizes[dim] == 1 ? 0 : strides[dim]; };
  return {stride(tokens - 2), stride(tokens - 1), stride(tokens), heads ? stride(tokens + 1) : 0};
}

QKNormArguments norm_of(int64_t kind, double eps, const Optional& weight, const Optional& bias, const Optional& rstd) {
  QKNormArguments norm{};
  norm.kind = static_cast<NormKind>(kind);
  norm.eps = static_cast<float>(eps);
  norm.weight = data_of(weight);
  norm.bias = data_of(bias);
  norm.rstd = static_cast<const float*>(data_of(rstd));
  if (rstd) norm.rstd_strides = strides_of(*rstd, false);
  return norm;
}

void short_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t q_kind, Optional q_weight, Optional q_bias,
                     Optional q_rstd, double q_eps, int64_t k_kind, Optional k_weight, Optional k_bias, Optional k_rstd, double k_eps,
                     Optional cos, Optional sin, bool interleaved, const Tensor& out, Optional stored, Optional stored_scale) {
  const auto sizes = q.sizes();
  const int64_t tokens = static_cast<int64_t>(sizes.size()) - 3;
  ShortAttentionArguments a{};
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.q_strides = strides_of(q);
  a.k_strides = strides_of(k);
  a.v_strides = strides_of(v);
  a.out_strides = strides_of(out);
  a.dtype = a.stored_dtype = dtype_of(q);
  if (stored) {
    a.stored = stored->mutable_data_ptr();
    a.stored_strides = strides_of(*stored);
    a.stored_dtype = dtype_of(*stored);
  }
  if (stored_scale) {
    a.stored_scale = static_cast<float*>(stored_scale->mutable_data_ptr());
    a.stored_scale_strides = strides_of(*stored_scale);
  }
  a.q_norm = norm_of(q_kind, q_eps, q_weight, q_bias, q_rstd);
  a.k_norm = norm_of(k_kind, k_eps, k_weight, k_bias, k_rstd);
  a.cos = static_cast<const float*>(data_of(cos));
  a.sin = static_cast<const float*>(data_of(sin));
  a.scale = static_cast<float>(scale);
  a.batch = sizes[tokens - 1];
  a.sequences = a.batch * (tokens > 1 ? sizes[0] : 1);
  a.tokens = sizes[tokens];
  a.heads = sizes[tokens + 1];
  a.head_dim = sizes[tokens + 2];
  a.rotary = cos ? 2 * cos->sizes()[1] : 0;
  a.interleaved = interleaved;
  launch_on(q, "short_attention", plan_short_attention(a).refusal, [&](void* stream) { return pab_short_attention(&a, stream); });
}

}  // namespace
}  // namespace pab

STABLE_TORCH_LIBRARY_IMPL(pab_kernels_cuda, CUDA, library) { library.impl("short_attention", TORCH_BOX(&pab::short_attention)); }
