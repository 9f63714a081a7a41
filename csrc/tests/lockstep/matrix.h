// Matrices that a warp holds in fragments, as the tables of the PTX manual ("Matrix Fragments for mma.m16n8k16", "movmatrix", "ldmatrix") have
// them. In all, g = lane / 4 is a row and t = lane % 4 a pair of columns. csrc/mma.cuh has the same functions for the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "memory.h"

namespace lockstep {

inline double half_at(std::uint32_t pair, int which, __nv_bfloat16) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{static_cast<unsigned short>(pair >> 16 * which)}));
}
inline double half_at(std::uint32_t pair, int which, __half) {
  return __half2float(__half(__half_raw{static_cast<unsigned short>(pair >> 16 * which)}));
}

template <int kRegisters>
struct Operands {
  std::uint32_t a[2 * kRegisters], b[kRegisters];
  float c[4];
};
struct Accumulator {
  float d[4];
};

// d += a b: a is 16 x K, b is K x 8, K = 8 kRegisters. Products are exact; a sum rounds once, where the device rounds somewhat more often.
template <typename T, int kRegisters>
void mma(float (&d)[4], const std::uint32_t (&a)[2 * kRegisters], const std::uint32_t (&b)[kRegisters]) {
  constexpr int kDepth = 8 * kRegisters;
  Operands<kRegisters> operands;
  std::copy(a, a + 2 * kRegisters, operands.a);
  std::copy(b, b + kRegisters, operands.b);
  std::copy(d, d + 4, operands.c);
  const Accumulator result = collective<Operands<kRegisters>, Accumulator>("mma", 0xffffffffu, operands, [](auto& brought, auto& taken) {
    double left[16][kDepth], right[kDepth][8];
    for (int lane = 0; lane < warpSize; ++lane) {
      if (brought[lane] == nullptr) fail("mma: the warp has no lane %d", lane);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 2 * kRegisters; ++i) {
        for (int half = 0; half < 2; ++half) left[g + i % 2 * 8][i / 2 * 8 + 2 * t + half] = half_at(brought[lane]->a[i], half, T{});
      }
      for (int i = 0; i < kRegisters; ++i) {
        for (int half = 0; half < 2; ++half) right[i * 8 + 2 * t + half][g] = half_at(brought[lane]->b[i], half, T{});
      }
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = brought[lane]->c[i];
        for (int k = 0; k < kDepth; ++k) sum += left[row][k] * right[k][column];
        taken[lane]->d[i] = static_cast<float>(sum);
      }
    }
  });
  std::copy(result.d, result.d + 4, d);
}

// The transpose of an 8 x 8 matrix of halves.
inline std::uint32_t movmatrix_trans(std::uint32_t pair) {
  return collective<std::uint32_t, std::uint32_t>("movmatrix", 0xffffffffu, pair, [](auto& brought, auto& taken) {
    for (int lane = 0; lane < warpSize; ++lane) {
      if (brought[lane] == nullptr) fail("movmatrix: the warp has no lane %d", lane);
    }
    for (int lane = 0; lane < warpSize; ++lane) {
      std::uint32_t result = 0;
      for (int half = 0; half < 2; ++half) {
        const int row = lane % 4 * 2 + half, column = lane / 4;
        result |= (*brought[row * 4 + column / 2] >> 16 * (column % 2) & 0xffffu) << 16 * half;
      }
      *taken[lane] = result;
    }
  });
}

template <int kMatrices>
struct Fragments {
  std::uint32_t r[kMatrices];
};

// kMatrices 8 x 8 matrices of halves from shared memory; lane 8 i + j names row j of the i-th, 16 bytes.
template <int kMatrices, bool kTransposed>
void ldmatrix(std::uint32_t (&r)[kMatrices], const void* row) {
  using Taken = Fragments<kMatrices>;
  const Taken result = collective<const void*, Taken>("ldmatrix", 0xffffffffu, row, [](auto& brought, auto& taken) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      std::uint16_t at[8][8];
      for (int i = 0; i < 8; ++i) {
        const void* const* from = brought[matrix * 8 + i];
        if (from == nullptr) fail("ldmatrix: the warp has no lane %d", matrix * 8 + i);
        if (reinterpret_cast<std::uintptr_t>(*from) % 16 != 0) fail("ldmatrix: the row of lane %d is misaligned", matrix * 8 + i);
        if (!memory.shared.holds(reinterpret_cast<std::uintptr_t>(*from), 16)) fail("ldmatrix: the row of lane %d is not in shared memory", matrix * 8 + i);
        std::memcpy(at[i], *from, 16);
      }
      for (int lane = 0; lane < warpSize; ++lane) {
        const int g = lane / 4, t = lane % 4;
        taken[lane]->r[matrix] = kTransposed ? at[2 * t][g] | std::uint32_t{at[2 * t + 1][g]} << 16
                                             : at[g][2 * t] | std::uint32_t{at[g][2 * t + 1]} << 16;
      }
    }
  });
  std::copy(result.r, result.r + kMatrices, r);
}

}  // namespace lockstep
