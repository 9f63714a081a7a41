#include "short_attention_plan.h"

namespace pab {
namespace {

// Whether each head of each token begins at a multiple of 16 bytes, or of 8 of an 8-bit dtype.
bool heads_are_vectors(const void* pointer, const HeadStrides& s, DType dtype) {
  const int bytes = is_activation(dtype) ? 16 : 8;
  const std::int64_t elements = bytes / size_of(dtype);
  const auto divides = [=](std::int64_t stride) { return stride % elements == 0; };
  return is_aligned(pointer, bytes) && divides(s.first) && divides(s.second) && divides(s.token) && divides(s.head);
}

bool norm_is_aligned(const QKNormArguments& norm) { return is_aligned(norm.weight, 16) && is_aligned(norm.bias, 16); }

const char* refuse(const ShortAttentionArguments& a) {
  if (a.dtype != DType::kFloat16 && a.dtype != DType::kBFloat16) return "activations are float16 or bfloat16";
  if (a.stored != nullptr && a.stored_dtype != a.dtype && is_activation(a.stored_dtype)) {
    return "what is stored has the dtype of the activations, int8 or float8_e4m3fn";
  }
  if (a.head_dim != 64 && a.head_dim != 72 && a.head_dim != 96 && a.head_dim != 128) {
    return "head dimensions of 64, 72, 96 and 128 are supported";
  }
  if (a.tokens < 1 || a.tokens > kShortAttentionMaxTokens) return "1 to 64 tokens are supported";
  if (a.sequences < 0 || a.batch < 1 || a.heads < 0) return "sequences and heads are at least 0, the second batch dimension at least 1";
  if (a.rotary < 0 || a.rotary > a.head_dim || a.rotary % 2 != 0) return "an even number of channels rotates, up to the head dimension";
  if (a.heads > 0 && a.sequences > kMaxGridX / a.heads) return "fewer than 2^31 heads of sequences are supported";
  if (!heads_are_vectors(a.q, a.q_strides, a.dtype) || !heads_are_vectors(a.k, a.k_strides, a.dtype) ||
      !heads_are_vectors(a.v, a.v_strides, a.dtype) || !heads_are_vectors(a.out, a.out_strides, a.dtype)) {
    return "each head of q, k, v and out begins at a multiple of 16 bytes";
  }
  if (a.stored != nullptr && !heads_are_vectors(a.stored, a.stored_strides, a.stored_dtype)) {
    return "each head of what is stored begins at a multiple of 16 bytes, or 8 where it has 8 bits";
  }
  if (!norm_is_aligned(a.q_norm) || !norm_is_aligned(a.k_norm) || !is_aligned(a.cos, 16) || !is_aligned(a.sin, 16)) {
    return "weights, biases and tables begin at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace

LaunchPlan plan_short_attention(const ShortAttentionArguments& a) {
  if (const char* why = refuse(a)) return refused(why);
  LaunchPlan plan;
  plan.grid[0] = static_cast<unsigned>(ceil_div(a.sequences * a.heads, short_attention_block_heads(a.tokens)));
  plan.block = 32 * kShortAttentionWarps;
  const bool rotates_shared = a.rotary > 0 && !short_attention_rotates_words(a.rotary, a.interleaved);
  const bool shared = short_attention_rows(a.tokens) == 64 || rotates_shared;
  plan.shared_bytes = shared ? kShortAttentionWarps * short_attention_warp_bytes(a.tokens, static_cast<int>(a.head_dim)) : 0;
  plan.vector_bytes = 16;
  return plan;
}

}  // namespace pab
