// The operation short_attention: attention of many sequences of up to 64 tokens, with norms and rotary embedding of q and k.
#pragma once

#include "plan.h"

namespace pab {

// Strides in elements of a tensor [first, second, token, head, channel] whose channels are neighbours.
struct HeadStrides {
  std::int64_t first, second, token, head;
};

enum class NormKind : int { kNone, kRms, kLayer, kAcross };

// weight and bias may be null. For kAcross the reciprocal root is given, and weight has a row for each head.
struct QKNormArguments {
  NormKind kind;
  float eps;
  const void* weight;          // [D] or [H, D], of q's dtype
  const void* bias;            // [D], of q's dtype
  const float* rstd;           // [first, second, token]
  HeadStrides rstd_strides;    // head: 0
};

struct ShortAttentionArguments {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  void* stored;                // nullptr: nothing is stored
  float* stored_scale;         // [first, second, token, head], where stored has 8 bits
  HeadStrides q_strides;
  HeadStrides k_strides;
  HeadStrides v_strides;
  HeadStrides out_strides;
  HeadStrides stored_strides;
  HeadStrides stored_scale_strides;
  QKNormArguments q_norm;
  QKNormArguments k_norm;
  const float* cos;            // [token, rotary / 2]
  const float* sin;
  float scale;                 // of the scores, for a softmax in powers of two
  std::int64_t sequences;      // of both batch dimensions
  std::int64_t batch;          // size of the second batch dimension
  std::int64_t tokens;
  std::int64_t heads;
  std::int64_t head_dim;
  std::int64_t rotary;         // channels that rotate; 0 without an embedding
  bool interleaved;
  DType dtype;                 // of q, k, v and out
  DType stored_dtype;
};

}  // namespace pab

// Launch on `stream` of the current device. A cudaError_t; cudaErrorInvalidValue where the planner refuses.
extern "C" int pab_short_attention(const pab::ShortAttentionArguments* arguments, void* stream);
