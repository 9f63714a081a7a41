// What the tests on a device begin with: `if (!has_device()) return kSkipped;`
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

constexpr int kSkipped = 77;  // for ctest

inline bool has_device() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  std::printf("skipped: there is no CUDA device\n");
  return false;
}
