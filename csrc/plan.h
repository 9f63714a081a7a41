// The launch plan that a planner makes, and types that all operations share. Plain host C++.
#pragma once

#include <cstdint>

namespace pab {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8E4M3 };

constexpr int size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kInt8 || dtype == DType::kFloat8E4M3 ? 1 : 2;
}

constexpr bool is_activation(DType dtype) { return size_of(dtype) > 1; }

constexpr std::int64_t kMaxGridX = 2147483647;
constexpr std::int64_t kMaxGridYZ = 65535;

struct LaunchPlan {
  unsigned grid[3] = {1, 1, 1};   // a dimension of 0: nothing is launched
  unsigned block = 1;             // threads
  unsigned shared_bytes = 0;      // dynamic shared memory
  int vector_bytes = 0;           // of activations that a lane accesses at once
  bool waits = false;             // the kernel itself waits for earlier ones in the stream, and may start before they have ended
  const char* refusal = nullptr;  // why the kernel cannot serve; nullptr where it can
};

inline LaunchPlan refused(const char* why) {
  LaunchPlan plan;
  plan.refusal = why;
  return plan;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// bytes: a power of two.
inline bool is_aligned(const void* pointer, int bytes) { return (reinterpret_cast<std::uintptr_t>(pointer) & (bytes - 1)) == 0; }

}  // namespace pab
