// Memory that kernels reach: named buffers, shared memory, their own stacks and constants. g++ announces every access to the functions below
// (it takes them for the thread sanitizer's), and every misaligned one and every index out of range (the undefined behaviour sanitizer's).
#pragma once

#include <link.h>

#include <algorithm>

#include "fibers.h"

// Blocks run one at a time, all threads of one in one thread of the CPU: shared memory is what has a segment of its own and is one for all.
#undef __shared__
#define __shared__ thread_local

namespace pab {
alignas(1024) inline thread_local unsigned char dynamic_shared[lockstep::kMaxDynamicShared];
}

namespace lockstep {

struct Range {
  std::uintptr_t begin = 0, end = 0;
  bool holds(std::uintptr_t address, std::size_t bytes) const { return begin <= address && address + bytes <= end; }
};

struct Buffer {
  Range range;
  bool writable;
  std::vector<std::uint8_t> reads, writes;  // of each byte, up to 255
};

struct Memory {
  std::vector<Buffer> buffers;
  std::size_t last = 0;  // the buffer of the last access: most likely that of the next
  Range image;           // this library's code and constants
  Range parameters;      // of the launch
  Range shared;          // its segment of thread_local variables: shared memory
  unsigned dynamic_bytes = 0;
};

inline Memory memory;

inline Range around(const void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  return {address, address + bytes};
}

inline void find_segments() {
  volatile unsigned char touched = pab::dynamic_shared[0];  // the segment is there from the first access on
  static_cast<void>(touched);
  const auto look = [](dl_phdr_info* info, std::size_t, void* own) {
    Range image{~std::uintptr_t{0}, 0}, shared;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      if (segment.p_type == PT_LOAD) {
        image.begin = std::min<std::uintptr_t>(image.begin, info->dlpi_addr + segment.p_vaddr);
        image.end = std::max<std::uintptr_t>(image.end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
      }
      if (segment.p_type == PT_TLS) shared = around(info->dlpi_tls_data, segment.p_memsz);
    }
    if (!image.holds(reinterpret_cast<std::uintptr_t>(own), 1)) return 0;
    memory.image = image;
    memory.shared = shared;
    return 1;
  };
  dl_iterate_phdr(look, &memory);
}

inline void poison_shared() {
  if (memory.shared.begin != 0) std::memset(reinterpret_cast<void*>(memory.shared.begin), 0xff, memory.shared.end - memory.shared.begin);
}

inline void check_access(std::uintptr_t address, std::size_t bytes, bool write) {
  if (around(machine.stacks, kMaxThreads * kStackBytes).holds(address, bytes)) return;
  const std::size_t count = memory.buffers.size();
  for (std::size_t i = 0; i < count; ++i) {
    Buffer& buffer = memory.buffers[memory.last];
    if (buffer.range.holds(address, bytes)) {
      if (write && !buffer.writable) fail("a write of %zu bytes at byte %zu of a buffer that is read only", bytes, address - buffer.range.begin);
      std::uint8_t* counts = (write ? buffer.writes : buffer.reads).data() + (address - buffer.range.begin);
      for (std::size_t byte = 0; byte < bytes; ++byte) counts[byte] += counts[byte] < 255;
      return;
    }
    memory.last = (memory.last + 1) % count;
  }
  if (memory.shared.holds(address, bytes)) {
    const Range dynamic = around(pab::dynamic_shared, kMaxDynamicShared);
    if (!dynamic.holds(address, bytes) || address + bytes <= dynamic.begin + memory.dynamic_bytes) return;
    fail("an access to byte %zu of %u bytes of dynamic shared memory", address + bytes - 1 - dynamic.begin, memory.dynamic_bytes);
  }
  if (memory.image.holds(address, bytes) || memory.parameters.holds(address, bytes)) return;
  for (const Buffer& buffer : memory.buffers) {
    if (address < buffer.range.end + 4096 && address + 4096 > buffer.range.begin) {
      fail("a %s of %zu bytes at byte %td of a buffer of %zu bytes", write ? "write" : "read", bytes,
           static_cast<std::ptrdiff_t>(address - buffer.range.begin), buffer.range.end - buffer.range.begin);
    }
  }
  fail("a %s of %zu bytes far from every buffer", write ? "write" : "read", bytes);
}

__attribute__((no_sanitize("thread"), noinline)) inline void announced(const volatile void* address, std::size_t bytes, bool write) {
  if (!machine.checks) return;
  machine.checks = false;
  check_access(reinterpret_cast<std::uintptr_t>(address), bytes, write);
  machine.checks = true;
}

struct SourceLocation {
  const char* file;
  std::uint32_t line, column;
};

}  // namespace lockstep

// Names that the compiler calls.
#define LOCKSTEP_HOOK extern "C" __attribute__((weak, used, visibility("hidden"), no_sanitize("thread")))
#define LOCKSTEP_WIDTH(bytes)                                                                                                   \
  LOCKSTEP_HOOK void __tsan_read##bytes(void* address) { lockstep::announced(address, bytes, false); }                          \
  LOCKSTEP_HOOK void __tsan_write##bytes(void* address) { lockstep::announced(address, bytes, true); }                          \
  LOCKSTEP_HOOK void __tsan_unaligned_read##bytes(const void* address) { lockstep::announced(address, bytes, false); }          \
  LOCKSTEP_HOOK void __tsan_unaligned_write##bytes(void* address) { lockstep::announced(address, bytes, true); }
LOCKSTEP_WIDTH(1)
LOCKSTEP_WIDTH(2)
LOCKSTEP_WIDTH(4)
LOCKSTEP_WIDTH(8)
LOCKSTEP_WIDTH(16)
#undef LOCKSTEP_WIDTH
LOCKSTEP_HOOK void __tsan_read_range(void* address, std::size_t bytes) { lockstep::announced(address, bytes, false); }
LOCKSTEP_HOOK void __tsan_write_range(void* address, std::size_t bytes) { lockstep::announced(address, bytes, true); }
LOCKSTEP_HOOK void __tsan_vptr_update(void**, void*) {}
LOCKSTEP_HOOK void __tsan_init() {}

LOCKSTEP_HOOK void __ubsan_handle_type_mismatch_v1_abort(lockstep::SourceLocation* at, std::uintptr_t address) {
  lockstep::fail("a misaligned access at %s:%u, at an address that ends in 0x%02x", at->file, at->line, static_cast<unsigned>(address & 0xff));
}
LOCKSTEP_HOOK void __ubsan_handle_out_of_bounds_abort(lockstep::SourceLocation* at, std::uintptr_t index) {
  lockstep::fail("index %td is out of range at %s:%u", static_cast<std::ptrdiff_t>(index), at->file, at->line);
}

#define LOCKSTEP_API extern "C" __attribute__((weak, used, visibility("default")))

// Names a buffer that kernels may read and, if it is writable, write. Buffers do not overlap.
LOCKSTEP_API void lockstep_buffer(void* begin, std::size_t bytes, int writable) {
  lockstep::memory.buffers.push_back(
      {lockstep::around(begin, bytes), writable != 0, std::vector<std::uint8_t>(bytes), std::vector<std::uint8_t>(bytes)});
}

// Forgets all buffers.
LOCKSTEP_API void lockstep_forget() {
  lockstep::memory.buffers.clear();
  lockstep::memory.last = 0;
}

// How often each byte of the buffer that begins there was read or written; nullptr where none begins.
LOCKSTEP_API const std::uint8_t* lockstep_counts(const void* begin, int writes) {
  for (const lockstep::Buffer& buffer : lockstep::memory.buffers) {
    if (buffer.range.begin == reinterpret_cast<std::uintptr_t>(begin)) return (writes ? buffer.writes : buffer.reads).data();
  }
  return nullptr;
}

// What ended the last launch; empty where nothing did.
LOCKSTEP_API const char* lockstep_error() { return lockstep::machine.error; }

// 0: threads are stepped from the first on; 1: from the last on.
LOCKSTEP_API void lockstep_order(int reversed) { lockstep::machine.reversed = reversed != 0; }
