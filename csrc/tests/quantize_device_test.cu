// quantize and dequantize on a device: the values come back within half a step, and nothing is written beyond the rows.
#include <cuda_runtime.h>

#include <cmath>
#include <vector>

#include "../quantize.h"
#include "check.h"
#include "device.h"

using namespace pab;

namespace {

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, values.size() * sizeof(T)) == cudaSuccess);
  CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  return pointer;
}

template <typename T>
std::vector<T> on_host(const T* pointer, std::size_t size) {
  std::vector<T> values(size);
  CHECK(cudaMemcpy(values.data(), pointer, size * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
  return values;
}

void round_trip(DType eight, std::int64_t rows, std::int64_t channels, std::int64_t group, std::int64_t padding) {
  const std::int64_t stride = channels + padding, groups = ceil_div(channels, group);
  std::vector<float> x(rows * stride);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = std::sin(static_cast<float>(i * i % 1009)) * std::pow(10.0f, static_cast<float>(i % 7) - 3);
  }
  const float poison = -12345.0f;
  float* x_device = on_device(x);
  float* out = on_device(std::vector<float>(rows * stride, poison));
  std::uint8_t* data = on_device(std::vector<std::uint8_t>(rows * stride, 0x80));
  float* scale = on_device(std::vector<float>(rows * groups, poison));

  const QuantizeArguments q{x_device, data, scale, rows, channels, group, stride, stride, groups, DType::kFloat32, eight};
  const DequantizeArguments d{data, scale, out, rows, channels, group, stride, groups, stride, eight, DType::kFloat32};
  CHECK(pab_quantize(&q, nullptr) == cudaSuccess);
  CHECK(pab_dequantize(&d, nullptr) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);

  const std::vector<float> back = on_host(out, x.size()), scales = on_host(scale, rows * groups);
  const float limit = eight == DType::kInt8 ? 127.0f : 448.0f;
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t c = 0; c < stride; ++c) {
      const std::int64_t i = row * stride + c;
      if (c >= channels) {
        CHECK(back[i] == poison);
        continue;
      }
      float largest = 0;
      for (std::int64_t k = c / group * group; k < channels && k < (c / group + 1) * group; ++k) {
        largest = std::fmax(largest, std::fabs(x[row * stride + k]));
      }
      const float step = scales[row * groups + c / group];
      CHECK(step == largest / limit);
      CHECK(std::fabs(back[i] - x[i]) <= 0.5001f * (eight == DType::kInt8 ? step : std::fmax(std::fabs(x[i]) / 8, step / 512)));
    }
  }
  cudaFree(x_device), cudaFree(out), cudaFree(data), cudaFree(scale);
}

}  // namespace

int main() {
  if (!has_device()) return kSkipped;
  for (const DType eight : {DType::kInt8, DType::kFloat8E4M3}) {
    round_trip(eight, 37, 1152, 128, 0);
    round_trip(eight, 5, 1152, 72, 8);
    round_trip(eight, 3, 137, 128, 3);
    round_trip(eight, 1, 1, 1, 0);
  }
  return failures();
}
