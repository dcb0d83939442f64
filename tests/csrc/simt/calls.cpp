// Calls for which threads wait for each other, and what goes wrong when they do not meet.
#include <algorithm>
#include <map>
#include <sstream>

#include "fibers.h"

namespace simt {
namespace {

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::kBarrier:
      return "__syncthreads";
    case Operation::kWarpSync:
      return "__syncwarp";
    case Operation::kShuffle:
      return "a shuffle";
    default:
      return "a vote";
  }
}

std::string describe(const Call& call) {
  std::ostringstream text;
  const std::string file = call.where.file_name();
  text << name_of(call.operation) << " at " << file.substr(file.rfind('/') + 1) << ':'
       << call.where.line();
  if (call.operation != Operation::kBarrier) text << " with mask 0x" << std::hex << call.mask;
  return text.str();
}

void release_block(Block& block) {
  uint64_t total = 0;
  const std::source_location& where = block.threads[0].call.where;
  for (Thread& thread : block.threads) {
    total += thread.call.value != 0;
    const std::source_location& other = thread.call.where;
    if (other.line() != where.line() || std::string(other.file_name()) != where.file_name()) {
      fail("divergent barrier: threads wait at " + describe(block.threads[0].call) + " and " +
           describe(thread.call));
    }
  }
  block.at_barrier = 0;
  ++block.epoch;
  for (Thread& thread : block.threads) {
    thread.total = total;
    scheduler.wake(thread);
  }
}

// Lets the lanes that wait for each other go on, once all of them are there.
bool release_lanes(Block& block, unsigned first, const Call& call) {
  unsigned present = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((call.mask >> lane & 1) == 0 || first + lane >= block.threads.size()) continue;
    const Thread& thread = block.threads[first + lane];
    if (thread.state == State::kDone) continue;
    // The thread that runs is the one that has come last.
    const bool waits = thread.state == State::kWaiting || &thread == scheduler.current;
    if (!waits || thread.call.operation == Operation::kBarrier) return false;
    present |= 1u << lane;
  }
  std::array<uint64_t, kWarp> brought{};
  std::array<uint32_t, kWarp> ordered{};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((present >> lane & 1) == 0) continue;
    const Thread& thread = block.threads[first + lane];
    const Call& other = thread.call;
    if (other.mask != call.mask || other.operation != call.operation ||
        other.where.line() != call.where.line()) {
      fail("lanes of a warp meet in different calls: " + describe(call) + " and " +
           describe(other));
    }
    brought[lane] = other.value;
    for (unsigned i = 0; i < kWarp; ++i) ordered[i] = std::max(ordered[i], thread.ordered_[i]);
    ordered[lane] = std::max(ordered[lane], thread.time + 1);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((present >> lane & 1) == 0) continue;
    Thread& thread = block.threads[first + lane];
    thread.present = present;
    thread.brought = brought;
    // Of these, __syncwarp alone orders what lanes read and write.
    if (call.operation == Operation::kWarpSync) {
      thread.ordered_ = ordered;
      ++thread.time;
    }
    scheduler.wake(thread);
  }
  return true;
}

}  // namespace

std::string describe_waiting() {
  std::map<std::string, int> waiting;
  unsigned done = 0;
  for (const Block& block : scheduler.resident()) {
    for (const Thread& thread : block.threads) {
      if (thread.state == State::kWaiting) ++waiting[describe(thread.call)];
      done += thread.state == State::kDone;
    }
  }
  std::ostringstream text;
  for (const auto& [call, count] : waiting) {
    text << count << " threads wait at " << call << "; ";
  }
  text << done << " have ended";
  return text.str();
}

void leave_calls(Thread& thread) {
  Block& block = *thread.block;
  if (block.at_barrier > 0 && block.at_barrier + block.done == block.threads.size()) {
    fail("divergent barrier: " + describe_waiting());
  }
  const unsigned first = thread.index / kWarp * kWarp;
  for (unsigned i = first; i < first + kWarp && i < block.threads.size(); ++i) {
    Thread& other = block.threads[i];
    if (other.state != State::kWaiting || other.call.operation == Operation::kBarrier) continue;
    if ((other.call.mask >> thread.lane() & 1) != 0) release_lanes(block, first, Call(other.call));
  }
}

uint64_t wait_for_block(uint64_t value, std::source_location where) {
  Thread& thread = *scheduler.current;
  Block& block = *thread.block;
  thread.call = {Operation::kBarrier, 0, value, where};
  ++block.at_barrier;
  if (block.at_barrier == block.threads.size()) {
    release_block(block);
  } else if (block.at_barrier + block.done == block.threads.size()) {
    fail("divergent barrier: some threads have ended, the others wait at " + describe(thread.call));
  } else {
    scheduler.wait();
  }
  return thread.total;
}

const Thread& wait_for_lanes(Operation operation, unsigned mask, uint64_t value,
                             std::source_location where) {
  Thread& thread = *scheduler.current;
  thread.call = {operation, mask, value, where};
  if ((mask >> thread.lane() & 1) == 0) {
    fail("wrong mask: lane " + std::to_string(thread.lane()) + " is not in that of its own " +
         describe(thread.call));
  }
  const unsigned first = thread.index / kWarp * kWarp;
  if (!release_lanes(*thread.block, first, thread.call)) scheduler.wait();
  return thread;
}

}  // namespace simt
