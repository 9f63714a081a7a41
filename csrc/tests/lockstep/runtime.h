// Launches, and the little of CUDA's runtime that launchers use. Streams are ignored: a launch has run when it returns.
#pragma once

#include "memory.h"

namespace lockstep {

template <typename Body>
cudaError_t launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, const Body& body) {
  machine.error[0] = '\0';
  machine.running = -1;
  gridDim = grid;
  blockDim = block;
  blockIdx = make_uint3(0, 0, 0);
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (_setjmp(machine.failed) != 0) {
    machine.fibers.reset(new Fiber[kMaxThreads]);
    machine.running = -1;
    return cudaErrorAssert;
  }
  if (threads == 0 || threads > kMaxThreads || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || dynamic_bytes > kMaxDynamicShared) {
    fail("a grid of (%u, %u, %u) and a block of (%u, %u, %u) with %zu bytes of shared memory cannot be launched", grid.x, grid.y, grid.z,
         block.x, block.y, block.z, dynamic_bytes);
  }
  find_segments();
  memory.dynamic_bytes = static_cast<unsigned>(dynamic_bytes);
  machine.threads = static_cast<int>(threads);
  machine.body = std::ref(body);
  memory.parameters = around(&body, sizeof body);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        poison_shared();
        run_block();
      }
    }
  }
  return cudaSuccess;
}

}  // namespace lockstep

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  // Parameters are copied for each thread, as on the device: what one does to its own, no other sees.
  return lockstep::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                          [kernel, arguments...]() { kernel(Parameters(arguments)...); });
}

template <typename T>
cudaError_t cudaFuncSetAttribute(T*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

LOCKSTEP_API cudaError_t cudaGetLastError() { return cudaSuccess; }
LOCKSTEP_API cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
LOCKSTEP_API cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Of an H100.
LOCKSTEP_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 132; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(lockstep::kMaxDynamicShared); return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}
