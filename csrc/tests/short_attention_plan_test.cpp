#include "../short_attention_plan.h"

#include <cstring>

#include "check.h"

using namespace pab;

namespace {

alignas(16) char memory[64];

ShortAttentionArguments call(std::int64_t sequences, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim) {
  ShortAttentionArguments a{};
  a.q = a.k = a.v = a.out = memory;
  a.q_strides = a.k_strides = a.v_strides = a.out_strides = {0, tokens * heads * head_dim, heads * head_dim, head_dim};
  a.sequences = a.batch = sequences;
  a.tokens = tokens;
  a.heads = heads;
  a.head_dim = head_dim;
  a.dtype = a.stored_dtype = DType::kBFloat16;
  return a;
}

}  // namespace

int main() {
  CHECK(plan_short_attention(call(5, 15, 16, 72)).grid[0] == 20);  // a warp a head of a sequence
  CHECK(plan_short_attention(call(5, 32, 16, 72)).grid[0] == 20);
  CHECK(plan_short_attention(call(5, 33, 16, 72)).grid[0] == 80);  // a block
  CHECK(plan_short_attention(call(5, 33, 1, 64)).grid[0] == 5);
  CHECK(plan_short_attention(call(5, 1, 1, 64)).grid[0] == 2);
  CHECK(plan_short_attention(call(5, 16, 16, 72)).shared_bytes == 0);
  CHECK(plan_short_attention(call(5, 64, 16, 72)).shared_bytes == 2 * 64 * 72 * 2);

  ShortAttentionArguments a = call(5, 16, 16, 72);
  a.rotary = 72;
  a.interleaved = true;
  CHECK(plan_short_attention(a).shared_bytes == 0);
  a.interleaved = false;
  CHECK(plan_short_attention(a).shared_bytes == 4 * 2 * 8 * 72 * 2);
  a.head_dim = 80;
  CHECK(std::strstr(plan_short_attention(a).refusal, "64, 72, 96 and 128"));

  a = call(5, 16, 16, 72);
  a.k = memory + 8;
  CHECK(std::strstr(plan_short_attention(a).refusal, "multiple of 16 bytes"));
  a = call(5, 16, 16, 72);
  a.stored = memory + 8;
  a.stored_strides = a.out_strides;
  CHECK(std::strstr(plan_short_attention(a).refusal, "or 8 where it has 8 bits"));
  a.stored_dtype = DType::kFloat8E4M3;
  CHECK(plan_short_attention(a).refusal == nullptr);
  return failures();
}
