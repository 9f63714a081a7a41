// short_attention on a device against float64: every kernel, norms and both rotary embeddings, and nothing is written beside the heads.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <vector>

#include "../short_attention.h"
#include "check.h"
#include "device.h"

using namespace pab;

namespace {

using Half = __nv_bfloat16;

template <typename T>
T* on_device(const std::vector<T>& values) {
  T* pointer = nullptr;
  CHECK(cudaMalloc(&pointer, values.size() * sizeof(T)) == cudaSuccess);
  CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  return pointer;
}

constexpr int kSequences = 3, kHeads = 5;

struct Call {
  int tokens, head_dim, rotary;
  bool interleaved;
  std::vector<float> packed, weight, cos, sin;  // [sequence, token, 3, head, channel]

  float at(int sequence, int token, int which, int head, int c) const {
    return packed[(((sequence * tokens + token) * 3 + which) * kHeads + head) * head_dim + c];
  }

  // The RMS norm and the rotary embedding of a row of q or k, each rounded to bfloat16.
  std::vector<double> prepared(int sequence, int token, int which, int head) const {
    const auto rounded = [](double x) { return static_cast<double>(__bfloat162float(__float2bfloat16_rn(static_cast<float>(x)))); };
    std::vector<double> x(head_dim);
    double squares = 0;
    for (int c = 0; c < head_dim; ++c) squares += std::pow(at(sequence, token, which, head, c), 2);
    const double rstd = 1 / std::sqrt(squares / head_dim + 1e-5);
    for (int c = 0; c < head_dim; ++c) x[c] = rounded(at(sequence, token, which, head, c) * rstd * weight[c]);
    for (int pair = 0; pair < rotary / 2; ++pair) {
      const int first = interleaved ? 2 * pair : pair, second = interleaved ? 2 * pair + 1 : pair + rotary / 2;
      const double a = x[first], b = x[second], c = cos[token * (rotary / 2) + pair], s = sin[token * (rotary / 2) + pair];
      x[first] = rounded(a * c - b * s);
      x[second] = rounded(b * c + a * s);
    }
    return x;
  }
};

std::vector<Half> halves(const std::vector<float>& values) {
  std::vector<Half> made;
  for (const float value : values) made.push_back(__float2bfloat16_rn(value));
  return made;
}

void attends(int tokens, int head_dim, int rotary, bool interleaved) {
  Call call{tokens, head_dim, rotary, interleaved, {}, {}, {}, {}};
  const auto value = [](int i) { return static_cast<float>(static_cast<int>(i * 7919ll % 1021) - 510) / 256; };
  for (int i = 0; i < kSequences * tokens * 3 * kHeads * head_dim; ++i) {
    call.packed.push_back(__bfloat162float(__float2bfloat16_rn(value(i))));
  }
  for (int c = 0; c < head_dim; ++c) call.weight.push_back(1 + static_cast<float>(c % 5) / 4);
  for (int i = 0; i < tokens * rotary / 2; ++i) {
    call.cos.push_back(std::cos(static_cast<float>(i)));
    call.sin.push_back(std::sin(static_cast<float>(i)));
  }
  constexpr int kRoom = 8;
  const float poison = 1234;
  Half* packed = on_device(halves(call.packed));
  Half* weight = on_device(halves(call.weight));
  float* cos = rotary ? on_device(call.cos) : nullptr;
  float* sin = rotary ? on_device(call.sin) : nullptr;
  std::vector<Half> out(static_cast<std::size_t>(kSequences) * tokens * kHeads * (head_dim + kRoom), __float2bfloat16_rn(poison));
  Half* out_device = on_device(out);

  const std::int64_t heads = static_cast<std::int64_t>(kHeads) * head_dim, head = head_dim + kRoom;
  ShortAttentionArguments a{};
  a.q = packed;
  a.k = packed + heads;
  a.v = packed + 2 * heads;
  a.out = out_device;
  a.q_strides = a.k_strides = a.v_strides = {0, tokens * 3 * heads, 3 * heads, head_dim};
  a.out_strides = {0, tokens * kHeads * head, kHeads * head, head};
  a.q_norm = a.k_norm = {NormKind::kRms, 1e-5f, weight, nullptr, nullptr, {}};
  a.cos = cos;
  a.sin = sin;
  a.scale = 1.4426950408889634f / std::sqrt(static_cast<float>(head_dim));
  a.sequences = a.batch = kSequences;
  a.tokens = tokens;
  a.heads = kHeads;
  a.head_dim = head_dim;
  a.rotary = rotary;
  a.interleaved = interleaved;
  a.dtype = a.stored_dtype = DType::kBFloat16;
  CHECK(pab_short_attention(&a, nullptr) == cudaSuccess);
  CHECK(cudaMemcpy(out.data(), out_device, out.size() * sizeof(Half), cudaMemcpyDeviceToHost) == cudaSuccess);

  for (int place = 0; place < kSequences * kHeads; ++place) {
    const int sequence = place / kHeads, h = place % kHeads;
    for (int token = 0; token < tokens; ++token) {
      const std::vector<double> q = call.prepared(sequence, token, 0, h);
      std::vector<double> expected(head_dim, 0.0);
      double sum = 0;
      for (int key = 0; key < tokens; ++key) {
        const std::vector<double> k = call.prepared(sequence, key, 1, h);
        double score = 0;
        for (int c = 0; c < head_dim; ++c) score += q[c] * k[c];
        const double p = std::exp2(score * a.scale);
        sum += p;
        for (int c = 0; c < head_dim; ++c) expected[c] += p * call.at(sequence, key, 2, h, c);
      }
      const Half* row = out.data() + ((sequence * tokens + token) * kHeads + h) * head;
      for (int c = 0; c < head_dim; ++c) CHECK(std::fabs(__bfloat162float(row[c]) - expected[c] / sum) < 0.02);
      for (int c = head_dim; c < head; ++c) CHECK(__bfloat162float(row[c]) == __bfloat162float(__float2bfloat16_rn(poison)));
    }
  }
  cudaFree(packed), cudaFree(weight), cudaFree(cos), cudaFree(sin), cudaFree(out_device);
}

}  // namespace

int main() {
  if (!has_device()) return kSkipped;
  for (const int head_dim : {64, 72, 96, 128}) {
    for (const int tokens : {1, 15, 16, 30, 33, 64}) {
      attends(tokens, head_dim, 0, true);
      attends(tokens, head_dim, head_dim, true);
      attends(tokens, head_dim, head_dim, false);
      attends(tokens, head_dim, 12, true);
    }
  }
  return failures();
}
