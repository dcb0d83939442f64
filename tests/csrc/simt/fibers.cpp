#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
// All __shared__ variables of the library lie here.
__attribute__((weak, visibility("hidden"))) extern char __start_simt_shared[];
__attribute__((weak, visibility("hidden"))) extern char __stop_simt_shared[];
}

namespace simt {

Place place;

namespace {

constexpr unsigned kResidentBlocks = 3;
constexpr size_t kStackBytes = size_t{1} << 17;
constexpr char kPoison = static_cast<char>(0xa5);

size_t shared_bytes() { return __stop_simt_shared - __start_simt_shared; }

// Redzones of the address sanitizer lie between the variables, and are copied with them.
#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address"))) void copy_bytes(char* to, const char* from, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<volatile char*>(to)[i] = from[i];
}
#else
void copy_bytes(char* to, const char* from, size_t size) { memcpy(to, from, size); }
#endif

}  // namespace

Scheduler scheduler;

void Scheduler::allocate(unsigned fibers) {
  const size_t needed = fibers * kStackBytes;
  if (needed <= stack_bytes) return;
  if (stacks != nullptr) munmap(stacks, stack_bytes);
  void* memory = mmap(nullptr, needed, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stacks = static_cast<char*>(memory);
  stack_bytes = needed;
}

unsigned Scheduler::number(const Thread& thread) const {
  const auto slot = static_cast<unsigned>(thread.block - resident_.data());
  const unsigned number = slot * threads_ + thread.index;
  // Of the last thread first, where that is to run first.
  if (schedule != Schedule::kReversed) return number;
  return static_cast<unsigned>(resident_.size()) * threads_ - 1 - number;
}

void Scheduler::start_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.main_bottom_, &scheduler.main_size_);
#endif
  (*scheduler.body_)();
  scheduler.end_of(*scheduler.current);
  scheduler.leave(true);
}

void Scheduler::prepare(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(thread.stack, kStackBytes);
#endif
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack;
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, &Scheduler::start_fiber, 0);
  thread.fake_stack = nullptr;
  thread.state = State::kReady;
  thread.call = {};
  thread.time = 1;
  thread.ordered_ = {};
  ready_.insert(number(thread));
}

void Scheduler::admit(Block& block, unsigned index) {
  block.index = index;
  block.at_barrier = 0;
  block.done = 0;
  block.epoch = 1;
  block.shared.assign(shared_bytes(), kPoison);
  block.is_written.assign(shared_bytes(), false);
  if (shown_ == &block) shown_ = nullptr;
  for (Thread& thread : block.threads) prepare(thread);
}

// Shared memory that no block has written reads as kPoison.
void Scheduler::show_shared_memory_of(Block& block) {
  const size_t size = shared_bytes();
  if (shown_ == &block || size == 0) return;
  if (shown_ != nullptr) copy_bytes(shown_->shared.data(), __start_simt_shared, size);
  copy_bytes(__start_simt_shared, block.shared.data(), size);
  shown_ = &block;
}

void Scheduler::resume(Thread& thread) {
  current = &thread;
  place.thread = {thread.index, 0, 0};
  place.block = {thread.block->index, 0, 0};
  show_shared_memory_of(*thread.block);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fake_stack_, thread.stack, kStackBytes);
#endif
  swapcontext(&main_, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
  current = nullptr;
}

// Back from a thread to run().
void Scheduler::leave(bool for_good) {
  Thread& thread = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &thread.fake_stack, main_bottom_, main_size_);
#else
  (void)for_good;
#endif
  swapcontext(&thread.context, &main_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &main_bottom_, &main_size_);
#endif
}

void Scheduler::end_of(Thread& thread) {
  thread.state = State::kDone;
  ready_.erase(number(thread));
  ++thread.block->done;
  leave_calls(thread);
}

void Scheduler::yield() { leave(false); }

void Scheduler::wait() {
  current->state = State::kWaiting;
  ready_.erase(number(*current));
  leave(false);
}

void Scheduler::wake(Thread& thread) {
  if (thread.state != State::kWaiting) return;  // the one that came last has not waited
  thread.state = State::kReady;
  ready_.insert(number(thread));
}

void Scheduler::preempt(unsigned one_in) {
  if (current == nullptr) return;
  if (schedule == Schedule::kInOrder || schedule == Schedule::kReversed) return;
  const bool now =
      schedule == Schedule::kLockstep ? ++chances_ % one_in == 0 : random.below(one_in) == 0;
  if (!now) return;
  yield();
}

void Scheduler::fail(const std::string& what) {
  if (error_.empty()) error_ = what;
  leave(true);
  __builtin_unreachable();
}

unsigned Scheduler::pick() {
  const auto size = static_cast<unsigned>(resident_.size()) * threads_;
  switch (schedule) {
    case Schedule::kRandom:
      return ready_.next(random.below(size));
    case Schedule::kLockstep:
      return ready_.next((last_ + 1) % size);
    case Schedule::kOneWarpAhead:
      if (random.below(256) == 0) warp_ahead_ = random.below(size) / kWarp * kWarp;
      // The warp runs ahead, but its lanes in any order.
      if (const unsigned lane = ready_.next((warp_ahead_ + random.below(kWarp)) % size);
          lane / kWarp == warp_ahead_ / kWarp) {
        return lane;
      }
      return ready_.next(warp_ahead_);
    default:
      return ready_.next(0);
  }
}

std::string Scheduler::run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  ++launches;
  resident_ = std::vector<Block>(std::min(blocks, kResidentBlocks));
  threads_ = threads;
  body_ = &body;
  error_.clear();
  shown_ = nullptr;
  last_ = warp_ahead_ = 0;
  place.threads = {threads, 1, 1};
  place.blocks = {blocks, 1, 1};
  allocate(kResidentBlocks * 1024);
  ready_.reset(static_cast<unsigned>(resident_.size()) * threads);
  char* stack = stacks;
  unsigned next_block = 0;
  for (Block& block : resident_) {
    block.threads.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.index = i;
      thread.stack = stack;
      stack += kStackBytes;
    }
    admit(block, next_block++);
  }
  unsigned left = blocks;
  while (left > 0 && error_.empty()) {
    if (ready_.empty()) {
      error_ = "deadlock: " + describe_waiting();
      break;
    }
    last_ = pick();
    unsigned at = last_;
    if (schedule == Schedule::kReversed) {
      at = static_cast<unsigned>(resident_.size()) * threads - 1 - last_;
    }
    Block& block = resident_[at / threads];
    resume(block.threads[at % threads]);
    if (block.done < threads) continue;
    block.done = 0;
    --left;
    if (next_block < blocks) admit(block, next_block++);
  }
  return error_;
}

void preempt_at_atomic() { scheduler.preempt(2); }
void preempt_at_access() { scheduler.preempt(8); }

Thread* current_thread() { return scheduler.current; }
void fail(const std::string& what) { scheduler.fail(what); }
uint32_t launch_number() { return scheduler.launches; }

bool is_shared(const void* address, size_t* offset) {
  const auto* at = static_cast<const char*>(address);
  if (at < __start_simt_shared || at >= __stop_simt_shared) return false;
  *offset = at - __start_simt_shared;
  return true;
}

bool is_local(const void* address) {
  const auto* at = static_cast<const char*>(address);
  return at >= scheduler.stacks && at < scheduler.stacks + scheduler.stack_bytes;
}

void set_schedule(Schedule schedule, uint64_t seed) {
  scheduler.schedule = schedule;
  scheduler.random.seed(seed);
}

std::string run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  return scheduler.run(blocks, threads, body);
}

}  // namespace simt
