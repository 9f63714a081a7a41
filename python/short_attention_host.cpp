#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "../csrc/short_attention_plan.h"
#include "host.h"

namespace py = pybind11;
using namespace py::literals;

namespace pab {
namespace {

// An address, and the strides over both batch dimensions, tokens and heads.
using Placed = std::array<std::int64_t, 5>;

HeadStrides strides(const Placed& p) { return {p[1], p[2], p[3], p[4]}; }

}  // namespace

void bind_short_attention(py::module_& module) {
  module.def("short_attention_block_heads", &short_attention_block_heads, "tokens"_a, "Heads of sequences that a block has.");
  module.def(
      "plan_short_attention",
      [](const Placed& q, const Placed& k, const Placed& v, const Placed& out, const std::optional<Placed>& stored,
         const std::array<std::uintptr_t, 6>& vectors, std::int64_t sequences, std::int64_t batch, std::int64_t tokens, std::int64_t heads,
         std::int64_t head_dim, std::int64_t rotary, bool interleaved, DType dtype, DType stored_dtype) {
        ShortAttentionArguments a{};
        a.q = address(q[0]);
        a.k = address(k[0]);
        a.v = address(v[0]);
        a.out = address(out[0]);
        a.q_strides = strides(q);
        a.k_strides = strides(k);
        a.v_strides = strides(v);
        a.out_strides = strides(out);
        if (stored) {
          a.stored = address((*stored)[0]);
          a.stored_strides = strides(*stored);
        }
        a.q_norm.weight = address(vectors[0]);
        a.q_norm.bias = address(vectors[1]);
        a.k_norm.weight = address(vectors[2]);
        a.k_norm.bias = address(vectors[3]);
        a.cos = static_cast<const float*>(address(vectors[4]));
        a.sin = static_cast<const float*>(address(vectors[5]));
        a.sequences = sequences;
        a.batch = batch;
        a.tokens = tokens;
        a.heads = heads;
        a.head_dim = head_dim;
        a.rotary = rotary;
        a.interleaved = interleaved;
        a.dtype = dtype;
        a.stored_dtype = stored_dtype;
        return plan_short_attention(a);
      },
      "q"_a, "k"_a, "v"_a, "out"_a, "stored"_a, "vectors"_a, "sequences"_a, "batch"_a, "tokens"_a, "heads"_a, "head_dim"_a, "rotary"_a,
      "interleaved"_a, "dtype"_a, "stored_dtype"_a,
      "The launch of short_attention; tensors are their address and strides over both batch dimensions, tokens and heads; vectors are the\n"
      "addresses of q's weight and bias, k's, cos and sin.");
}

}  // namespace pab
