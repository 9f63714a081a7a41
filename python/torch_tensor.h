// What the torch registration of every operation shares, on torch's stable ABI alone.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../csrc/plan.h"

// Both are torch's where it is built with CUDA and absent where it is not: weak, so that the library loads there too.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
const char* cudaGetErrorString(int error);
int cudaGetDevice(int* device);
}

namespace pab {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Float8_e4m3fn: return DType::kFloat8E4M3;
    default: throw std::runtime_error("pab_kernels: a tensor's dtype is none of float32, float16, bfloat16, int8 and float8_e4m3fn");
  }
}

// `[..., C]` as rows of C channels with one stride between them.
struct Rows {
  int64_t rows, channels, stride;
};

inline Rows rows_of(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  Rows rows{1, sizes[last], 0};
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows.rows == 1) {
      rows.stride = strides[i];
    } else if (strides[i] != rows.stride * rows.rows) {
      throw std::runtime_error("pab_kernels: the rows of a tensor have no common stride");
    }
    rows.rows *= sizes[i];
  }
  return rows;
}

// Calls `launch(stream)` on the tensor's device and current stream; raises with the planner's reason or CUDA's.
template <typename Launch>
void launch_on(const Tensor& t, const char* op, const char* refusal, Launch launch) {
  if (refusal != nullptr) throw std::runtime_error(std::string(op) + ": " + refusal);
  if (aoti_torch_get_current_cuda_stream == nullptr || !t.is_cuda()) {
    throw std::runtime_error(std::string(op) + ": its CUDA kernel runs on CUDA tensors under a torch that is built with CUDA");
  }
  const int32_t device = t.get_device_index();
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  int current = -1, error = cudaGetDevice(&current);
  if (error == 0 && current == device) {
    error = launch(stream);
  } else if (error == 0) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    error = launch(stream);
  }
  if (error != 0) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace pab
