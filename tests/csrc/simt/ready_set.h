// Which fibers can run, and which of them is next.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed * 0x9e3779b97f4a7c15u + 1; }
  unsigned below(unsigned n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<unsigned>((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_ = 1;
};

// Threads that can run, by number.
class ReadySet {
 public:
  void reset(unsigned size) {
    words_.assign((size + 63) / 64, 0);
    count_ = 0;
  }
  void insert(unsigned i) {
    words_[i / 64] |= uint64_t{1} << i % 64;
    ++count_;
  }
  void erase(unsigned i) {
    words_[i / 64] &= ~(uint64_t{1} << i % 64);
    --count_;
  }
  bool empty() const { return count_ == 0; }
  // The first that is >= i, or else the first of all.
  unsigned next(unsigned i) const {
    uint64_t word = words_[i / 64] & ~uint64_t{0} << i % 64;
    size_t at = i / 64;
    while (word == 0) {
      at = (at + 1) % words_.size();
      word = words_[at];
    }
    return static_cast<unsigned>(64 * at + std::countr_zero(word));
  }

 private:
  std::vector<uint64_t> words_;
  unsigned count_ = 0;
};

}  // namespace simt
