// Threads of a block as fibers, stepped one after the other, each until it waits; and what they wait for.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace lockstep {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kMaxDynamicShared = 232448;  // of a block on sm_90 and sm_100

// What a lane waits at, and what it brought and takes.
struct Waiting {
  const char* name = nullptr;  // nullptr: it runs
  unsigned mask = 0;           // of lanes of its warp; 0: all threads of the block
  const void* brought = nullptr;
  void* taken = nullptr;
};

struct Fiber {
  ucontext_t entry;
  jmp_buf place;
  uint3 thread;
  bool begun = false;
  bool finished = false;
  Waiting waiting;
};

struct Machine {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMaxThreads]};
  char* stacks = static_cast<char*>(mmap(nullptr, kMaxThreads* kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  std::function<void()> body;
  jmp_buf scheduler;
  jmp_buf failed;
  int threads = 0;
  int running = -1;     // the fiber that runs; -1: the scheduler
  bool checks = false;  // kernel code runs, not this machinery
  bool reversed = false;
  char error[512] = "";
};

inline Machine machine;

// Ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  machine.checks = false;
  char what[300];
  va_list values;
  va_start(values, format);
  std::vsnprintf(what, sizeof what, format, values);
  va_end(values);
  if (machine.running < 0) {
    std::snprintf(machine.error, sizeof machine.error, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, what);
  } else {
    std::snprintf(machine.error, sizeof machine.error, "block (%u, %u, %u), thread %d (warp %d, lane %d): %s", blockIdx.x, blockIdx.y,
                  blockIdx.z, machine.running, machine.running / warpSize, machine.running % warpSize, what);
  }
  if (std::getenv("LOCKSTEP_ABORT") != nullptr) {
    std::fprintf(stderr, "lockstep: %s\n", machine.error);
    std::abort();
  }
  _longjmp(machine.failed, 1);
}

// The machinery at work inside a kernel: its own accesses are not the kernel's.
struct Unchecked {
  Unchecked() { machine.checks = false; }
  ~Unchecked() { machine.checks = true; }
};

inline void run_fiber() {
  for (;;) {
    machine.checks = true;
    machine.body();
    machine.checks = false;
    Fiber& fiber = machine.fibers[machine.running];
    fiber.finished = true;
    if (_setjmp(fiber.place) == 0) _longjmp(machine.scheduler, 1);
  }
}

// Until the fiber waits or has finished.
inline void resume(int index) {
  Fiber& fiber = machine.fibers[index];
  machine.running = index;
  threadIdx = fiber.thread;
  if (_setjmp(machine.scheduler) == 0) {
    if (fiber.begun) {
      machine.checks = false;
      _longjmp(fiber.place, 1);
    }
    fiber.begun = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = machine.stacks + index * kStackBytes;
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, run_fiber, 0);
    setcontext(&fiber.entry);
  }
  machine.running = -1;
}

// Stops the running fiber until another has cleared what it waits for.
inline void yield() {
  Fiber& fiber = machine.fibers[machine.running];
  if (_setjmp(fiber.place) == 0) _longjmp(machine.scheduler, 1);
}

inline void run_block() {
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.finished = false;
    fiber.waiting = {};
    fiber.thread = make_uint3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  for (int left = machine.threads; left > 0;) {
    bool moved = false;
    for (int step = 0; step < machine.threads; ++step) {
      const int index = machine.reversed ? machine.threads - 1 - step : step;
      Fiber& fiber = machine.fibers[index];
      if (fiber.finished || fiber.waiting.name != nullptr) continue;
      resume(index);
      moved = true;
      left -= fiber.finished;
    }
    if (moved) continue;
    for (int i = 0; i < machine.threads; ++i) {
      const Waiting& waiting = machine.fibers[i].waiting;
      if (waiting.name == nullptr) continue;
      const int first = i / warpSize * warpSize;
      const unsigned mask = waiting.mask == 0 ? 0xffffffffu : waiting.mask;
      for (int other = 0; other < machine.threads; ++other) {
        if (waiting.mask != 0 && (other < first || other >= first + warpSize || (mask >> (other - first) & 1) == 0)) continue;
        const Fiber& missing = machine.fibers[other];
        if (missing.finished) fail("thread %d waits at %s for thread %d, which has returned", i, waiting.name, other);
        if (std::strcmp(missing.waiting.name, waiting.name) != 0 || missing.waiting.mask != waiting.mask) {
          fail("thread %d waits at %s(0x%x) for thread %d, which waits at %s(0x%x)", i, waiting.name, waiting.mask, other,
               missing.waiting.name, missing.waiting.mask);
        }
      }
    }
    fail("no thread can go on");
  }
}

// Waits until every lane of the mask has come to the collective `name` with the same mask. The last to come calls `act(brought, taken)` with what
// all brought and where they take from, by lane; nullptr for lanes that are not in the mask.
template <typename Brought, typename Taken, typename Act>
Taken collective(const char* name, unsigned mask, const Brought& brought, const Act& act) {
  Unchecked unchecked;
  const int lane = machine.running % warpSize, first = machine.running - lane;
  const int lanes = machine.threads - first < warpSize ? machine.threads - first : warpSize;
  if (lanes < warpSize && mask == 0xffffffffu) mask = (1u << lanes) - 1;  // the block's last warp
  if ((mask >> lane & 1) == 0) fail("%s(0x%x) does not name the lane that calls it", name, mask);
  if (lanes < warpSize && mask >> lanes != 0) fail("%s(0x%x) names lanes that the warp does not have", name, mask);
  Taken taken{};
  machine.fibers[machine.running].waiting = {name, mask, &brought, &taken};
  const Brought* all_brought[warpSize] = {};
  Taken* all_taken[warpSize] = {};
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Waiting& other = machine.fibers[first + i].waiting;
    if (other.name == nullptr || std::strcmp(other.name, name) != 0 || other.mask != mask) {
      yield();  // somebody is still to come, and wakes this one
      return taken;
    }
    all_brought[i] = static_cast<const Brought*>(other.brought);
    all_taken[i] = static_cast<Taken*>(other.taken);
  }
  act(all_brought, all_taken);
  for (int i = 0; i < lanes; ++i) {
    if (mask >> i & 1) machine.fibers[first + i].waiting = {};
  }
  return taken;
}

// Waits for all threads of the block.
inline void block_barrier() {
  Unchecked unchecked;
  machine.fibers[machine.running].waiting = {"__syncthreads", 0, nullptr, nullptr};
  for (int i = 0; i < machine.threads; ++i) {
    const Waiting& other = machine.fibers[i].waiting;
    if (machine.fibers[i].finished || other.name == nullptr || other.mask != 0) return yield();
  }
  for (int i = 0; i < machine.threads; ++i) machine.fibers[i].waiting = {};
}

}  // namespace lockstep
