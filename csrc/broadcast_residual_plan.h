// How broadcast_residual is launched.
#pragma once

#include "broadcast_residual.h"
#include "plan.h"

namespace pab {

constexpr int kMaxChannels = 8192;
constexpr int kWarp = 32;
constexpr int kWarpRows = 4;       // tokens of a block whose tokens have a warp each

// Threads of a token of this many times 8 channels, whole warps.
constexpr int row_threads_of(std::int64_t vectors, int lane_vectors) {
  return static_cast<int>(ceil_div(vectors, lane_vectors * kWarp)) * kWarp;
}

// Of a kernel with this many vectors a thread; one vector is for narrow tokens alone.
constexpr int max_block(int lane_vectors) {
  const int widest = lane_vectors == 1 ? 2 * kWarp : row_threads_of(kMaxChannels / 8, lane_vectors);
  return widest < kWarpRows * kWarp ? kWarpRows * kWarp : widest;
}

// A token's channels lie in the registers of one warp or of one block, `lane_vectors` times 8 neighbours in each thread.
struct BroadcastResidualPlan : LaunchPlan {
  int lane_vectors = 0;
  int row_threads = 0;             // a multiple of 32: 32 is a warp of a block of several tokens, more are a block
};

// Appends an outer leading dimension, merged with the outermost one where the strides of all operands allow it. False if there is no
// room for it.
bool append_dimension(BroadcastResidualArguments& arguments, std::int64_t size, const std::int64_t (&strides)[kOperands]);

BroadcastResidualPlan plan_broadcast_residual(const BroadcastResidualArguments& arguments);

}  // namespace pab
