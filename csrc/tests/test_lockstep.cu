// The lockstep machine itself: what it computes is right, and what is wrong ends a launch with a sentence. Exits with the number of failures.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "mma.cuh"

namespace pab {
namespace {

int failures = 0;

void expect(bool fine, const std::string& what) {
  if (fine) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s; the machine says '%s'\n", what.c_str(), lockstep_error());
}

template <typename... Parameters, typename... Arguments>
cudaError_t run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 64;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// A launch that must end with these words.
template <typename... Parameters, typename... Arguments>
void expect_fault(const char* words, void (*kernel)(Parameters...), unsigned threads, Arguments... arguments) {
  const cudaError_t error = run(kernel, 1, threads, arguments...);
  expect(error == cudaErrorAssert && std::strstr(lockstep_error(), words) != nullptr, std::string("no fault with the words: ") + words);
}

template <typename T>
__device__ float wide(T x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(x);
  } else {
    return __bfloat162float(x);
  }
}

template <typename T>
__device__ std::uint32_t pair(const T* first, const T* second) {
  std::uint16_t low, high;
  std::memcpy(&low, first, 2);
  std::memcpy(&high, second, 2);
  return low | std::uint32_t{high} << 16;
}

// c [16, 8] = a [16, K] b [K, 8], row by row.
template <typename T, int kDepth>
__global__ void product(const T* a, const T* b, float* c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  std::uint32_t left[kDepth / 4], right[kDepth / 8];
  for (int i = 0; i < kDepth / 4; ++i) {
    const T* at = a + (g + i % 2 * 8) * kDepth + i / 2 * 8 + 2 * t;
    left[i] = pair(at, at + 1);
  }
  for (int i = 0; i < kDepth / 8; ++i) right[i] = pair(b + (i * 8 + 2 * t) * 8 + g, b + (i * 8 + 2 * t + 1) * 8 + g);
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  if constexpr (kDepth == 16) {
    mma_m16n8k16<T>(d, left, right);
  } else {
    mma_m16n8k8<T>(d, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <typename T, int kDepth>
void test_product(const char* name) {
  T a[16 * kDepth], b[kDepth * 8];
  float c[16 * 8];
  for (int i = 0; i < 16 * kDepth; ++i) a[i] = T(static_cast<float>(i * 37 % 101 - 50) / 8);
  for (int i = 0; i < kDepth * 8; ++i) b[i] = T(static_cast<float>(i * 53 % 97 - 48) / 16);
  lockstep_buffer(a, sizeof a, 0);
  lockstep_buffer(b, sizeof b, 0);
  lockstep_buffer(c, sizeof c, 1);
  bool right = run(product<T, kDepth>, 1, 32, a, b, c) == cudaSuccess;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 1.0f;  // exact: all are multiples of 1 / 128
      for (int k = 0; k < kDepth; ++k) sum += wide(a[row * kDepth + k]) * wide(b[k * 8 + column]);
      right = right && c[row * 8 + column] == sum;
    }
  }
  for (std::size_t i = 0; i < sizeof c; ++i) right = right && lockstep_counts(c, 1)[i] == 1 && lockstep_counts(c, 0)[i] == 0;
  for (std::size_t i = 0; i < sizeof a; ++i) right = right && lockstep_counts(a, 0)[i] == 1;
  expect(right, name);
  lockstep_forget();
}

// to = the transpose of from, both 8 x 8.
__global__ void transpose(const std::uint16_t* from, std::uint16_t* to) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const std::uint32_t turned = movmatrix_trans(pair(from + g * 8 + 2 * t, from + g * 8 + 2 * t + 1));
  to[g * 8 + 2 * t] = static_cast<std::uint16_t>(turned);
  to[g * 8 + 2 * t + 1] = static_cast<std::uint16_t>(turned >> 16);
}

void test_transpose() {
  std::uint16_t from[64], to[64];
  for (int i = 0; i < 64; ++i) from[i] = static_cast<std::uint16_t>(1000 + i);
  lockstep_buffer(from, sizeof from, 0);
  lockstep_buffer(to, sizeof to, 1);
  bool right = run(transpose, 1, 32, from, to) == cudaSuccess;
  for (int i = 0; i < 64; ++i) right = right && to[i] == from[i % 8 * 8 + i / 8];
  expect(right, "movmatrix transposes");
  lockstep_forget();
}

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  int* at = out + lane * 6;
  at[0] = __shfl_xor_sync(0xffffffffu, lane, 5);
  at[1] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  at[2] = __shfl_up_sync(0xffffffffu, lane, 3, 16);
  at[3] = __shfl_sync(0xffffffffu, lane, lane + 1, 4);
  at[4] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  at[5] = -1;
  if (lane % 2 == 0) at[5] = __shfl_xor_sync(0x55555555u, lane, 2);
}

void test_shuffles() {
  int out[32 * 6];
  for (int reversed = 0; reversed < 2; ++reversed) {
    lockstep_order(reversed);
    lockstep_buffer(out, sizeof out, 1);
    bool right = run(shuffles, 1, 32, out) == cudaSuccess;
    for (int lane = 0; lane < 32; ++lane) {
      const int* at = out + lane * 6;
      right = right && at[0] == (lane ^ 5) && at[1] == (lane % 8 + 3 < 8 ? lane + 3 : lane) && at[2] == (lane % 16 >= 3 ? lane - 3 : lane) &&
              at[3] == lane / 4 * 4 + (lane + 1) % 4 && at[4] == 0x49249249 && at[5] == (lane % 2 == 0 ? (lane ^ 2) : -1);
    }
    expect(right, "shuffles and votes");
    lockstep_forget();
  }
  lockstep_order(0);
}

extern __shared__ unsigned char dynamic_shared[];

__global__ void through_shared(const float* in, float* out, bool barrier) {
  __shared__ float kept[64];
  const unsigned thread = threadIdx.x;
  out[blockIdx.x * 64 + thread] = kept[thread] != kept[thread] ? 1.0f : 0.0f;  // poisoned before every block
  kept[thread] = in[blockIdx.x * 64 + thread];
  if (thread < 16) reinterpret_cast<float*>(pab::dynamic_shared)[thread] = 2.0f;
  if (barrier) __syncthreads();
  out[blockIdx.x * 64 + thread] += kept[63 - thread] * reinterpret_cast<float*>(pab::dynamic_shared)[15 - thread % 16];
}

void test_shared() {
  float in[128], out[128];
  for (int i = 0; i < 128; ++i) in[i] = static_cast<float>(i);
  const auto wrong = [&](bool barrier, int reversed) {
    lockstep_order(reversed);
    lockstep_buffer(in, sizeof in, 0);
    lockstep_buffer(out, sizeof out, 1);
    int wrong = run(through_shared, 2, 64, in, out, barrier) == cudaSuccess ? 0 : 1000;
    for (int i = 0; i < 128; ++i) wrong += out[i] != 1.0f + 2.0f * in[i / 64 * 64 + 63 - i % 64];
    for (std::size_t i = 0; i < sizeof out; ++i) wrong += lockstep_counts(out, 1)[i] != 2;
    lockstep_forget();
    return wrong;
  };
  expect(wrong(true, 0) == 0 && wrong(true, 1) == 0, "shared memory");
  expect(wrong(false, 0) > 0 && wrong(false, 1) > 0, "a missing barrier shows");
  lockstep_order(0);
}

__global__ void copy16(const unsigned char* from, unsigned char* to) {
  *reinterpret_cast<uint4*>(to + 16 * threadIdx.x) = *reinterpret_cast<const uint4*>(from + 16 * threadIdx.x);
}

__global__ void add_one(float* x, int offset) { x[static_cast<int>(threadIdx.x) + offset] += 1.0f; }

__global__ void index_beyond(float* x, int at) {
  float values[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  x[threadIdx.x] = values[at];
}

__global__ void dynamic_beyond(int at) { pab::dynamic_shared[at] = 1; }

__global__ void barrier_in_a_branch() {
  if (threadIdx.x != 3) __syncthreads();
}

__global__ void lanes_apart(int* x) {
  if (threadIdx.x < 16) {
    x[0] = __shfl_xor_sync(0xffffffffu, 1, 1);
  } else {
    __syncwarp();
  }
}

__global__ void reads_a_lane_that_is_not_there(int* x) {
  if (threadIdx.x < 8) x[threadIdx.x] = __shfl_xor_sync(0xffu, 1, 8);
}

void test_faults() {
  // On the heap, apart from one another: beside them is nothing that may be touched.
  constexpr std::size_t kBytes = 16 * 8 + 16;
  std::vector<unsigned char> heap(3 * 8192);
  unsigned char* from = heap.data() + 8192 + (16 - reinterpret_cast<std::uintptr_t>(heap.data()) % 16) % 16;
  unsigned char* to = from + 8192;
  lockstep_buffer(from, kBytes, 0);
  lockstep_buffer(to, kBytes, 1);
  expect(run(copy16, 1, 8, from, to) == cudaSuccess, "aligned accesses");
  expect_fault("a misaligned access at", copy16, 8, from + 8, to);
  expect_fault("a misaligned access at", copy16, 8, from, to + 2);
  expect_fault("a write of 4 bytes at byte 0 of a buffer that is read only", add_one, 1, reinterpret_cast<float*>(from), 0);
  expect_fault("at byte 144 of a buffer of 144 bytes", add_one, 8, reinterpret_cast<float*>(to), 33);
  expect_fault("at byte -4 of a buffer of 144 bytes", add_one, 8, reinterpret_cast<float*>(to), -1);
  expect_fault("far from every buffer", add_one, 8, reinterpret_cast<float*>(to), 100000000);
  expect_fault("index 4 is out of range at", index_beyond, 1, reinterpret_cast<float*>(to), 4);
  expect_fault("an access to byte 64 of 64 bytes of dynamic shared memory", dynamic_beyond, 1, 64);
  expect_fault("waits at __syncthreads for thread 3, which has returned", barrier_in_a_branch, 64);
  expect_fault("which waits at __syncwarp", lanes_apart, 32, reinterpret_cast<int*>(to));
  expect_fault("lane 0 reads lane 8, which the mask 0xff does not name", reads_a_lane_that_is_not_there, 32, reinterpret_cast<int*>(to));
  expect_fault("cannot be launched", copy16, 1025, from, to);
  expect(run(copy16, 1, 8, from, to) == cudaSuccess && lockstep_error()[0] == '\0', "a launch after a fault");
  lockstep_forget();
}

// What rounds to nearest even on the device does here, too.
__global__ void rounded(float* out) {
  out[0] = __bfloat162float(__float2bfloat16_rn(1.00390625f));  // halfway between 1 and its neighbour
  out[1] = __bfloat162float(__float2bfloat16_rn(1.01171875f));
  out[2] = __half2float(__float2half_rn(1.00048828125f));
  out[3] = static_cast<float>(__nv_cvt_float_to_fp8(1.0625f, __NV_SATFINITE, __NV_E4M3));
  out[4] = static_cast<float>(__nv_cvt_float_to_fp8(500.0f, __NV_SATFINITE, __NV_E4M3));
  out[5] = static_cast<float>(__float2int_rn(2.5f));
  out[6] = static_cast<float>(__byte_perm(0x03020100u, 0x07060504u, 0x7050u) >> 16);
  out[7] = static_cast<float>(__byte_perm(0x00008000u, 0u, 0x0009u) & 0xffu);
}

void test_intrinsics() {
  float out[8];
  const float right[8] = {1.0f, 1.015625f, 1.0f, 56.0f, 126.0f, 2.0f, 1792.0f, 255.0f};
  lockstep_buffer(out, sizeof out, 1);
  expect(run(rounded, 1, 1, out) == cudaSuccess && std::memcmp(out, right, sizeof out) == 0, "conversions and intrinsics");
  lockstep_forget();
}

}  // namespace
}  // namespace pab

int main() {
  pab::test_product<__nv_bfloat16, 16>("m16n8k16 of bfloat16");
  pab::test_product<__nv_bfloat16, 8>("m16n8k8 of bfloat16");
  pab::test_product<__half, 16>("m16n8k16 of half");
  pab::test_product<__half, 8>("m16n8k8 of half");
  pab::test_transpose();
  pab::test_shuffles();
  pab::test_shared();
  pab::test_faults();
  pab::test_intrinsics();
  return pab::failures;
}
