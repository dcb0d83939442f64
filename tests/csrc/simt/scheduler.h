// CUDA threads as fibers of one CPU thread, so that kernels run without a GPU under any schedule.
// A fiber runs until it waits for others or is preempted; who is next is drawn from a seed.
#pragma once

#include <ucontext.h>

#include <array>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace simt {

inline constexpr unsigned kWarp = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// What a kernel reads as threadIdx, blockIdx, blockDim and gridDim.
struct Place {
  Index thread, block, threads, blocks;
};
extern Place place;

enum class Schedule : int {
  kInOrder,       // the first thread that can run
  kReversed,      // the last
  kRandom,        // any, and any other at each chance
  kOneWarpAhead,  // one warp as far as it gets, then another
  kLockstep,      // each a little, one after the other
  kSchedules
};

// --- what threads do -----------------------------------------------------------------------------

enum class Operation { kBarrier, kWarpSync, kShuffle, kVote };

// A call for which threads wait for each other.
struct Call {
  Operation operation = Operation::kBarrier;
  unsigned mask = 0;   // lanes of the warp that take part
  uint64_t value = 0;  // what this thread brings
  std::source_location where;
};

struct Block;

enum class State { kReady, kWaiting, kDone };

struct Thread {
  ucontext_t context{};
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Block* block = nullptr;
  unsigned index = 0;  // in the block
  State state = State::kDone;
  Call call;
  unsigned present = 0;                   // lanes that took part in the last call
  std::array<uint64_t, kWarp> brought{};  // by each of them
  uint64_t total = 0;                     // threads of the block that brought something else than 0
  uint32_t time = 1;                      // of this thread: calls that order memory
  std::array<uint32_t, kWarp> ordered_{};  // accesses of a lane before this come before ours

  unsigned lane() const { return index % kWarp; }
};

struct Block {
  unsigned index = 0;
  std::vector<Thread> threads;
  unsigned at_barrier = 0;
  unsigned done = 0;
  uint32_t epoch = 1;            // barriers passed
  std::vector<char> shared;      // its shared memory while another block runs
  std::vector<bool> is_written;  // which bytes of it
};

// Waits for all threads of the block. Returns how many brought something else than 0.
uint64_t wait_for_block(uint64_t value, std::source_location where);
// Waits for the lanes of the mask; afterwards `brought` has what each of them brought.
const Thread& wait_for_lanes(Operation operation, unsigned mask, uint64_t value,
                             std::source_location where);
// Lets another thread run, sometimes: before an atomic operation, or before any access.
void preempt_at_atomic();
void preempt_at_access();

// The thread that runs, or null outside of kernels.
Thread* current_thread();
// Ends the kernel: what it did is an error.
[[noreturn]] void fail(const std::string& what);

// --- shared memory -------------------------------------------------------------------------------

// Whether the address is in shared memory; `offset` is where.
bool is_shared(const void* address, size_t* offset);
// Whether the address is on the stack of a thread.
bool is_local(const void* address);

// --- running -------------------------------------------------------------------------------------

void set_schedule(Schedule schedule, uint64_t seed);
// Runs `body` once for each thread. Returns what went wrong, or nothing.
std::string run(unsigned blocks, unsigned threads, const std::function<void()>& body);
// Kernels run so far: tells their accesses apart.
uint32_t launch_number();

}  // namespace simt
