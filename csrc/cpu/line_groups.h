// What is added to lines, brought together by groups of neighbouring lines. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

namespace torchrec_cafe {

// Lines are hit all over; those of a group are so few that their sums stay in a core's own cache.
class LineGroups {
 public:
  // Some of what is added: one piece after the other.
  struct Piece {
    const LineGradient* begin;
    int64_t size;
  };

  // Brings the pieces together, which have to live on. Depends on their sizes alone.
  LineGroups(std::vector<Piece> pieces, int64_t num_lines) : groups_(std::move(pieces)) {
    int64_t total = 0;
    for (const Piece& piece : groups_) total += piece.size;
    const int64_t wanted = std::min(kMost, total / kPerGroup + 1);
    while ((num_lines - 1) >> shift_ >= wanted) ++shift_;
    if (total == 0 || (num_lines - 1) >> shift_ == 0) {
      most_ = total;
      return;
    }
    bring_together(total, (num_lines - 1) >> shift_);
  }

  // How often something is added in a group at most.
  int64_t most() const { return most_; }

  // Whether lines of a piece are in no other.
  bool are_apart() const { return together_ != nullptr; }

  // What is added, in the order of the groups, and in the order of the pieces in each.
  const std::vector<Piece>& pieces() const { return groups_; }

 private:
  // A group's sums take up half a megabyte at most.
  static constexpr int64_t kPerGroup = 8192;
  // More could not be written to side by side.
  static constexpr int64_t kMost = 256;

  void bring_together(int64_t total, int64_t last_group) {
    std::vector<int64_t> next(last_group + 2, 0);
    each([&](const LineGradient& added) { ++next[(added.line >> shift_) + 1]; });
    for (int64_t group = 1; group <= last_group + 1; ++group) {
      most_ = std::max(most_, next[group]);
      next[group] += next[group - 1];
    }
    together_.reset(new LineGradient[total]);
    LineGradient* const together = together_.get();
    each([&](const LineGradient& added) { together[next[added.line >> shift_]++] = added; });
    groups_.clear();
    int64_t begin = 0;
    for (int64_t group = 0; group <= last_group; begin = next[group++]) {
      groups_.push_back({together + begin, next[group] - begin});
    }
  }

  template <typename Visit>
  void each(const Visit& visit) const {
    for (const Piece& piece : groups_) {
      for (int64_t i = 0; i < piece.size; ++i) visit(piece.begin[i]);
    }
  }

  std::vector<Piece> groups_;
  std::unique_ptr<LineGradient[]> together_;
  int64_t most_ = 0;
  int shift_ = 0;
};

}  // namespace torchrec_cafe
