// Device functions that a host compiler does not have. Approximations of the device (exp2f, rsqrtf, __expf) are exact here.
#pragma once

#include <cmath>

#include "fibers.h"

namespace lockstep {

// The value of another lane; `source(lane)` says whose, its own where that lies outside of its part of the warp.
template <typename T, typename Source>
T shuffle(const char* name, unsigned mask, T value, const Source& source) {
  return collective<T, T>(name, mask, value, [&](auto& brought, auto& taken) {
    for (int lane = 0; lane < warpSize; ++lane) {
      if (brought[lane] == nullptr) continue;
      const int from = source(lane);
      if (brought[from] == nullptr) fail("%s: lane %d reads lane %d, which the mask 0x%x does not name", name, lane, from, mask);
      *taken[lane] = *brought[from];
    }
  });
}

inline unsigned vote(const char* name, unsigned mask, bool predicate) {
  return collective<bool, unsigned>(name, mask, predicate, [](auto& brought, auto& taken) {
    unsigned votes = 0;
    for (int lane = 0; lane < warpSize; ++lane) votes |= static_cast<unsigned>(brought[lane] != nullptr && *brought[lane]) << lane;
    for (unsigned* all : taken) {
      if (all != nullptr) *all = votes;
    }
  });
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace lockstep

// width: a power of two up to 32; lanes read within their group of that many.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return lockstep::collective<std::pair<T, int>, T>("__shfl_sync", mask, {value, source}, [&](auto& brought, auto& taken) {
    for (int lane = 0; lane < warpSize; ++lane) {
      if (brought[lane] == nullptr) continue;
      const int from = (lane & -width) | (brought[lane]->second & (width - 1));
      if (brought[from] == nullptr) lockstep::fail("__shfl_sync: lane %d reads lane %d, which the mask 0x%x does not name", lane, from, mask);
      *taken[lane] = brought[from]->first;
    }
  });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int apart, int width = 32) {
  return lockstep::shuffle("__shfl_xor_sync", mask, value, [=](int lane) {
    const int from = lane ^ apart;
    return from >= (lane & -width) + width ? lane : from;
  });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned apart, int width = 32) {
  return lockstep::shuffle("__shfl_down_sync", mask, value, [=](int lane) {
    return (lane & (width - 1)) + static_cast<int>(apart) < width ? lane + static_cast<int>(apart) : lane;
  });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned apart, int width = 32) {
  return lockstep::shuffle("__shfl_up_sync", mask, value, [=](int lane) {
    return (lane & (width - 1)) >= static_cast<int>(apart) ? lane - static_cast<int>(apart) : lane;
  });
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) { return lockstep::vote("__ballot_sync", mask, predicate); }
inline bool __any_sync(unsigned mask, bool predicate) { return lockstep::vote("__any_sync", mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return lockstep::vote("__all_sync", mask, !predicate) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { lockstep::vote("__syncwarp", mask, false); }
inline void __syncthreads() { lockstep::block_barrier(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Programmatic dependent launch: the kernel before has ended.
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

inline float __uint_as_float(unsigned x) { return lockstep::bits<float>(x); }
inline float __int_as_float(int x) { return lockstep::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return lockstep::bits<unsigned>(x); }
inline int __float_as_int(float x) { return lockstep::bits<int>(x); }

// Bytes 0 to 3 are x's, 4 to 7 y's; each of the selector's four digits picks one, or with its top bit that byte's sign eight times.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t both = std::uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> 4 * i & 15, byte = both >> 8 * (digit & 7) & 255;
    result |= (digit & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(std::uint64_t{x} * y >> 32); }

// Saturating, NaN to 0, to nearest even.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return x >= 2147483648.0f ? 2147483647 : x <= -2147483648.0f ? -2147483647 - 1 : static_cast<int>(std::nearbyint(x));
}
inline int __float2int_rz(float x) {
  if (std::isnan(x)) return 0;
  return x >= 2147483648.0f ? 2147483647 : x <= -2147483648.0f ? -2147483647 - 1 : static_cast<int>(x);
}
inline float __int2float_rn(int x) { return static_cast<float>(x); }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// As on the device: of different integer types, the result has their common one.
template <typename T, typename U>
constexpr std::common_type_t<T, U> min(T x, U y) {
  using Common = std::common_type_t<T, U>;
  return static_cast<Common>(y) < static_cast<Common>(x) ? static_cast<Common>(y) : static_cast<Common>(x);
}
template <typename T, typename U>
constexpr std::common_type_t<T, U> max(T x, U y) {
  using Common = std::common_type_t<T, U>;
  return static_cast<Common>(x) < static_cast<Common>(y) ? static_cast<Common>(y) : static_cast<Common>(x);
}

template <typename T>
T __ldg(const T* p) { return *p; }
template <typename T>
T __ldcs(const T* p) { return *p; }
template <typename T>
T __ldcg(const T* p) { return *p; }
template <typename T>
void __stcs(T* p, T value) { *p = value; }
template <typename T>
void __stcg(T* p, T value) { *p = value; }

inline std::size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<std::size_t>(p); }
