// Finds data races: accesses of two threads to a byte, one of them a write, not both atomic, and no
// call between them that orders memory. The kernels are compiled with -fsanitize=thread, but linked
// to the functions below instead of its run time.
#include <dlfcn.h>

#include <memory>
#include <sstream>
#include <unordered_map>

#include "device.h"
#include "scheduler.h"

namespace simt {
namespace {

// Who has touched a byte, and when.
struct Access {
  uint32_t thread = 0;  // of the grid, from 1 on; 0: nobody
  uint32_t epoch = 0;   // barriers that its block had passed
  uint32_t time = 0;    // calls of its own that order memory
  bool is_atomic = false;
};

struct Byte {
  Access write;
  Access reads[2];
};

constexpr size_t kPageBytes = 1024;
// Addresses of shared memory are those of every block: each gets its own.
constexpr uintptr_t kSharedBase = uintptr_t{1} << 56;
constexpr uintptr_t kSharedStride = uintptr_t{1} << 20;

struct Page {
  uint32_t launch = 0;
  Byte bytes[kPageBytes];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
#if defined(SIMT_RACES)
bool enabled = true;
#else
bool enabled = false;  // what is not atomic is not seen
#endif

Byte& byte_at(uintptr_t address) {
  static uintptr_t last_number = ~uintptr_t{0};
  static Page* last = nullptr;
  const uintptr_t number = address / kPageBytes;
  if (number != last_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    last_number = number;
    last = page.get();
  }
  if (last->launch != launch_number()) {
    *last = Page{};
    last->launch = launch_number();
  }
  return last->bytes[address % kPageBytes];
}

// Whether what the other thread did comes before what this one does.
bool is_ordered(const Access& before, const Thread& thread) {
  const auto threads = static_cast<unsigned>(thread.block->threads.size());
  const unsigned block = (before.thread - 1) / threads;
  const unsigned index = (before.thread - 1) % threads;
  if (block != thread.block->index) return false;
  if (index == thread.index || before.epoch < thread.block->epoch) return true;
  return index / kWarp == thread.index / kWarp && before.time < thread.ordered_[index % kWarp];
}

std::string describe(const Access& access, unsigned threads) {
  return "thread " + std::to_string((access.thread - 1) % threads) + " of block " +
         std::to_string((access.thread - 1) / threads);
}

std::string place_of(const void* code) {
  Dl_info info{};
  std::ostringstream text;
  if (dladdr(code, &info) != 0) {
    text << "+0x" << std::hex
         << static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1;
  }
  return text.str();
}

void check(const Access& before, const Access& now, const char* what, const void* code) {
  const Thread& thread = *current_thread();
  if (before.thread == 0 || (before.is_atomic && now.is_atomic)) return;
  if (is_ordered(before, thread)) return;
  const auto threads = static_cast<unsigned>(thread.block->threads.size());
  fail("data race: " + describe(now, threads) + what + describe(before, threads) + ", at " +
       place_of(code));
}

void note_read(Byte& byte, const Access& now) {
  const Thread& thread = *current_thread();
  for (Access& read : byte.reads) {
    if (read.thread == 0 || is_ordered(read, thread)) {
      read = now;
      return;
    }
  }
  byte.reads[1] = now;
}

void check_shared(size_t offset, size_t size, bool is_write, const void* code) {
  std::vector<bool>& written = current_thread()->block->is_written;
  for (size_t i = offset; i < offset + size && i < written.size(); ++i) {
    if (!is_write && !written[i]) {
      fail("uninitialised shared memory is read, at " + place_of(code));
    }
    written[i] = true;
  }
}

}  // namespace

void access(const void* address, size_t size, Kind kind, const void* code) {
  const Thread* thread = current_thread();
  if (thread == nullptr || is_local(address)) return;
  const bool is_builtin = address >= &place && address < &place + 1;
  if (is_builtin) return;
  if (kind == Kind::kAtomic) {
    preempt_at_atomic();
  } else {
    preempt_at_access();
  }
  if (!enabled) return;
  size_t offset = 0;
  auto at = reinterpret_cast<uintptr_t>(address);
  if (is_shared(address, &offset)) {
    check_shared(offset, size, kind == Kind::kWrite, code);
    at = kSharedBase + thread->block->index * kSharedStride + offset;
  }
  const auto threads = static_cast<uint32_t>(thread->block->threads.size());
  const Access now{thread->block->index * threads + thread->index + 1, thread->block->epoch,
                   thread->time, kind == Kind::kAtomic};
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = byte_at(at + i);
    if (kind == Kind::kRead) {
      check(byte.write, now, " reads what is written by ", code);
      note_read(byte, now);
      continue;
    }
    check(byte.write, now, " writes what is written by ", code);
    for (const Access& read : byte.reads) check(read, now, " writes what is read by ", code);
    byte.write = now;
  }
}

void detect_races(bool on) { enabled = on; }

}  // namespace simt

// --- what the compiler calls ---------------------------------------------------------------------

#define SIMT_ACCESS(name, size, kind)                                           \
  void __tsan_##name(void* address) {                                           \
    simt::access(address, size, simt::Kind::kind, __builtin_return_address(0)); \
  }
#define SIMT_ACCESSES(size)            \
  SIMT_ACCESS(read##size, size, kRead) \
  SIMT_ACCESS(write##size, size, kWrite)
#define SIMT_UNALIGNED(size)                     \
  SIMT_ACCESS(unaligned_read##size, size, kRead) \
  SIMT_ACCESS(unaligned_write##size, size, kWrite)

extern "C" {

SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
SIMT_UNALIGNED(2)
SIMT_UNALIGNED(4)
SIMT_UNALIGNED(8)
SIMT_UNALIGNED(16)

void __tsan_read_range(void* address, size_t size) {
  simt::access(address, size, simt::Kind::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  simt::access(address, size, simt::Kind::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Of the host code: reference counts.
int __tsan_atomic32_fetch_add(volatile int* address, int value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
}
