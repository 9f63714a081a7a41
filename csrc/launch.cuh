// Launches a kernel by its plan.
#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace pab {

// Whether the current device can start a kernel before the previous one has ended.
inline bool device_overlaps_kernels() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// A cudaError_t. `kernel` takes exactly `arguments`; nothing is launched where a grid dimension is 0.
template <typename... Arguments>
int launch_kernel(void (*kernel)(Arguments...), const LaunchPlan& plan, void* stream, const Arguments&... arguments) {
  if (plan.refusal != nullptr) return cudaErrorInvalidValue;
  if (plan.grid[0] == 0 || plan.grid[1] == 0 || plan.grid[2] == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
  config.blockDim = dim3(plan.block);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute early = {};
  if (plan.waits && device_overlaps_kernels()) {
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &early;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace pab
