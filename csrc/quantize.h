// The operations quantize and dequantize: `value = data * scale`, a float32 scale for each group of channels of a token.
#pragma once

#include "plan.h"

namespace pab {

// Tokens are rows of `channels` neighbouring elements; strides are elements between rows.
struct QuantizeArguments {
  const void* x;               // [rows, channels]
  void* data;                  // [rows, channels]
  float* scale;                // [rows, ceil(channels / group)]
  std::int64_t rows;
  std::int64_t channels;
  std::int64_t group;
  std::int64_t x_stride;
  std::int64_t data_stride;
  std::int64_t scale_stride;
  DType x_dtype;               // float32, float16 or bfloat16
  DType data_dtype;            // int8 or float8 e4m3
};

struct DequantizeArguments {
  const void* data;            // [rows, channels]
  const float* scale;          // [rows, ceil(channels / group)]
  void* out;                   // [rows, channels]
  std::int64_t rows;
  std::int64_t channels;
  std::int64_t group;
  std::int64_t data_stride;
  std::int64_t scale_stride;
  std::int64_t out_stride;
  DType data_dtype;
  DType out_dtype;
};

}  // namespace pab

// Launch on `stream` of the current device. A cudaError_t; cudaErrorInvalidValue where the planner refuses.
extern "C" int pab_quantize(const pab::QuantizeArguments* arguments, void* stream);
extern "C" int pab_dequantize(const pab::DequantizeArguments* arguments, void* stream);
