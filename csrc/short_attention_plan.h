// How short_attention is launched.
#pragma once

#include "plan.h"
#include "short_attention.h"

namespace pab {

// A warp has all 16 or 32 rows of a head of a sequence, and a block four such heads; of 64 rows, a block has one head, 16 rows a warp.
constexpr int kShortAttentionWarps = 4;
constexpr int kShortAttentionMaxTokens = 64;

constexpr int short_attention_rows(std::int64_t tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : 64; }

// Heads of sequences of a block.
constexpr int short_attention_block_heads(std::int64_t tokens) { return short_attention_rows(tokens) == 64 ? 1 : kShortAttentionWarps; }

// Whether rotation takes the channels of a pair, neighbours, as a lane has them; if not, they meet in shared memory.
constexpr bool short_attention_rotates_words(std::int64_t rotary, bool interleaved) { return interleaved && rotary % 8 == 0; }

// Elements between rows there: 8 rows begin at 8 different multiples of 16 bytes, modulo the 128 of all banks.
constexpr int short_attention_row_stride(int head_dim) { return head_dim % 16 == 8 ? head_dim : head_dim + 8; }

// Shared memory of a warp: 8 rows of q and k each; of 64 rows, at least the 16 rows of k and v that the warp prepares for all.
constexpr int short_attention_warp_bytes(std::int64_t tokens, int head_dim) {
  return short_attention_rows(tokens) == 64 ? 2 * 16 * head_dim * 2 : 2 * 8 * short_attention_row_stride(head_dim) * 2;
}

LaunchPlan plan_short_attention(const ShortAttentionArguments& arguments);

}  // namespace pab
