#include "../quantize_plan.h"

#include <cstring>

#include "check.h"

using namespace pab;

namespace {

alignas(16) char memory[64];

QuantizeArguments quantize(std::int64_t rows, std::int64_t channels, std::int64_t group) {
  return {memory, memory + 32, nullptr, rows, channels, group, channels, channels, 0, DType::kBFloat16, DType::kInt8};
}

DequantizeArguments dequantize(std::int64_t rows, std::int64_t channels, std::int64_t group) {
  return {memory, nullptr, memory + 32, rows, channels, group, channels, 0, channels, DType::kFloat8E4M3, DType::kFloat32};
}

}  // namespace

int main() {
  CHECK(plan_quantize(quantize(5, 1152, 128)).vector_bytes == 16);
  CHECK(plan_quantize(quantize(5, 1152, 128)).grid[0] == 2);  // 45 groups, 32 a block
  CHECK(plan_quantize(quantize(32, 128, 128)).grid[0] == 1);
  CHECK(plan_quantize(quantize(0, 128, 128)).grid[0] == 0);
  CHECK(plan_quantize(quantize(5, 1156, 128)).vector_bytes == 2);
  CHECK(plan_quantize(quantize(5, 72, 36)).vector_bytes == 2);
  CHECK(std::strstr(plan_quantize(quantize(5, 300, 129)).refusal, "up to 128"));
  CHECK(std::strstr(plan_quantize(quantize(1ll << 31, 1, 1)).refusal, "2^31"));

  QuantizeArguments a = quantize(5, 1152, 128);
  a.x = memory + 2;
  CHECK(plan_quantize(a).vector_bytes == 2);
  a = quantize(5, 1152, 128);
  a.data_stride = 1156;
  CHECK(plan_quantize(a).vector_bytes == 2);
  a.data_stride = 1160;
  CHECK(plan_quantize(a).vector_bytes == 16);
  a.x_dtype = DType::kInt8;
  CHECK(plan_quantize(a).refusal != nullptr);

  CHECK(plan_dequantize(dequantize(5, 1152, 128)).vector_bytes == 16);
  CHECK(plan_dequantize(dequantize(5, 1152, 128)).grid[0] == 2);  // 720 pieces, 512 a block
  CHECK(plan_dequantize(dequantize(5, 1153, 128)).vector_bytes == 4);
  CHECK(plan_dequantize(dequantize(5, 1153, 128)).grid[0] == 12);
  CHECK(plan_dequantize(dequantize(2, 4096, 4096)).refusal == nullptr);
  DequantizeArguments d = dequantize(5, 64, 64);
  d.data_dtype = DType::kFloat16;
  CHECK(std::strstr(plan_dequantize(d).refusal, "data is int8"));
  return failures();
}
