// broadcast_residual on a device: what it computes is right, kernels in a row wait for one another, and nothing is written beyond the rows.
#include <cuda_runtime.h>

#include <cmath>
#include <vector>

#include "../broadcast_residual.h"
#include "check.h"
#include "device.h"

using namespace pab;

namespace {

constexpr float kPoison = -12345.0f;

float* on_device(const std::vector<float>& values) {
  float* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, values.size() * sizeof(float)) == cudaSuccess);
  CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice) == cudaSuccess);
  return pointer;
}

std::vector<float> on_host(const float* pointer, std::size_t size) {
  std::vector<float> values(size);
  CHECK(cudaMemcpy(values.data(), pointer, size * sizeof(float), cudaMemcpyDeviceToHost) == cudaSuccess);
  return values;
}

// x += gate * slot `repeats` times in place, and y = norm(x) * (1 + scale) + shift.
void test(NormKind norm, std::int64_t batch, std::int64_t tokens, std::int64_t channels, std::int64_t padding, int repeats) {
  const std::int64_t stride = channels + padding, size = batch * tokens * stride;
  std::vector<float> x(size), slot(size), rows(batch * channels);
  for (std::int64_t i = 0; i < size; ++i) {
    x[i] = std::sin(static_cast<float>(i % 1009));
    slot[i] = std::cos(static_cast<float>(i * 7 % 1013));
  }
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = std::sin(static_cast<float>(i * 3 % 997));
  float* x_device = on_device(x);
  float* slot_device = on_device(slot);
  float* rows_device = on_device(rows);
  float* y_device = on_device(std::vector<float>(size, kPoison));

  BroadcastResidualArguments a{};
  a.operands[kX] = a.operands[kXOut] = x_device;
  a.operands[kYOut] = y_device;
  a.operands[kSlots] = slot_device;
  a.operands[kScale] = a.operands[kShift] = a.operands[kGates] = rows_device;
  for (const int operand : {kX, kXOut, kYOut, kSlots}) a.strides[operand][0] = stride, a.strides[operand][1] = tokens * stride;
  for (const int operand : {kScale, kShift, kGates}) a.strides[operand][1] = channels;
  a.sizes[0] = tokens;
  a.sizes[1] = batch;
  a.dims = 2;
  a.channels = channels;
  a.eps = 1e-5f;
  a.slots = 1;
  a.norm = norm;
  a.dtype = a.slot_dtypes[0] = DType::kFloat32;
  for (int i = 0; i < repeats; ++i) CHECK(pab_broadcast_residual(&a, nullptr) == cudaSuccess);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);

  const std::vector<float> x_new = on_host(x_device, size), y = on_host(y_device, size);
  for (std::int64_t token = 0; token < batch * tokens; ++token) {
    const float* by = rows.data() + token / tokens * channels;
    double mean = 0, squares = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t i = token * stride + c;
      CHECK(std::fabs(x_new[i] - (x[i] + repeats * static_cast<double>(by[c]) * slot[i])) < 1e-6 * repeats * repeats);
      mean += norm == NormKind::kLayer ? x_new[i] / static_cast<double>(channels) : 0.0;
    }
    for (std::int64_t c = 0; c < channels; ++c) squares += std::pow(x_new[token * stride + c] - mean, 2);
    const double inverse = 1 / std::sqrt(squares / static_cast<double>(channels) + 1e-5);
    for (std::int64_t c = 0; c < stride; ++c) {
      const std::int64_t i = token * stride + c;
      if (c >= channels) {
        CHECK(y[i] == kPoison && x_new[i] == x[i]);
      } else {
        CHECK(std::fabs(y[i] - ((x_new[i] - mean) * inverse * (1.0 + by[c]) + by[c])) < 1e-5);
      }
    }
  }
  cudaFree(x_device), cudaFree(slot_device), cudaFree(rows_device), cudaFree(y_device);
}

}  // namespace

int main() {
  if (!has_device()) return kSkipped;
  test(NormKind::kLayer, 2, 37, 1152, 0, 1);
  test(NormKind::kLayer, 3, 5, 2304, 8, 20);
  test(NormKind::kRms, 1, 9, 137, 3, 20);
  test(NormKind::kRms, 1, 1, 8192, 0, 1);
  test(NormKind::kLayer, 1, 2000, 1, 0, 1);
  return failures();
}
