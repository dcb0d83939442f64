// The scheduler itself, for the sources of this folder only.
#pragma once

#include "ready_set.h"
#include "scheduler.h"

namespace simt {

class Scheduler {
 public:
  std::string run(unsigned blocks, unsigned threads, const std::function<void()>& body);

  // Of the thread that runs: lets others run, and waits for wake().
  void yield();
  void wait();
  void wake(Thread& thread);
  void preempt(unsigned one_in);
  [[noreturn]] void fail(const std::string& what);

  Schedule schedule = Schedule::kRandom;
  Random random;
  Thread* current = nullptr;
  uint32_t launches = 0;
  char* stacks = nullptr;
  size_t stack_bytes = 0;

  const std::vector<Block>& resident() const { return resident_; }

 private:
  static void start_fiber();
  void allocate(unsigned fibers);
  void admit(Block& block, unsigned index);
  void prepare(Thread& thread);
  void resume(Thread& thread);
  void leave(bool for_good);
  void end_of(Thread& thread);
  void show_shared_memory_of(Block& block);
  unsigned pick();
  unsigned number(const Thread& thread) const;

  std::vector<Block> resident_;
  Block* shown_ = nullptr;  // whose shared memory is in place
  ReadySet ready_;
  unsigned threads_ = 0;  // of a block
  unsigned last_ = 0;
  unsigned chances_ = 0;
  unsigned warp_ahead_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::string error_;
  ucontext_t main_{};
  void* main_fake_stack_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
};

extern Scheduler scheduler;

// What the threads that wait are waiting for.
std::string describe_waiting();
// A thread that has ended is no longer waited for by its warp, but it breaks a barrier.
void leave_calls(Thread& thread);

}  // namespace simt
