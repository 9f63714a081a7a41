// How quantize and dequantize are launched.
#pragma once

#include "plan.h"
#include "quantize.h"

namespace pab {

// quantize: a team of 16 lanes has 8 channels of a group a lane; it takes four groups, with all loads before the first store.
constexpr int kTeam = 16;
constexpr int kLaneChannels = 8;
constexpr int kMaxGroup = kTeam * kLaneChannels;
constexpr int kTeamGroups = 4;
constexpr int kQuantizeBlock = 128;
constexpr int kBlockGroups = kQuantizeBlock / kTeam * kTeamGroups;

// dequantize: a thread has four times 8 neighbouring channels, read one at a time where they are not aligned.
constexpr int kDequantizeBlock = 128;
constexpr int kThreadVectors = 4;

LaunchPlan plan_quantize(const QuantizeArguments& arguments);
LaunchPlan plan_dequantize(const DequantizeArguments& arguments);

}  // namespace pab
