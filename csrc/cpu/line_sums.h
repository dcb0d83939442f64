// Gradients of lines, added up by several threads. Torch-free, so that tests run it under
// sanitizers.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace torchrec_cafe {

// Some of what is added to lines.
struct LinePiece {
  LineGradient* begin;
  int64_t size;
};

// The sums of the lines that are hit, one after the other. What is added to a line is added in the
// order of the pieces, whatever the number of threads.
//
// `parallel_for(tasks, run)` calls run(task) for each task in [0, tasks), on any threads, and
// returns when all are done.
class LineSums {
 public:
  // The pieces have to live on, and are changed.
  template <typename ParallelFor>
  LineSums(const Kernels& kernels, std::vector<LinePiece> pieces, int64_t num_lines,
           const ParallelFor& parallel_for)
      : kernels_(kernels), pieces_(std::move(pieces)) {
    int64_t total = 0;
    for (const LinePiece& piece : pieces_) total += piece.size;
    // Lines are hit all over; those of a group are so few that their sums stay in a core's cache.
    const int64_t groups = std::min(kMostGroups, total / kPerGroup + 1);
    int shift = 0;
    while ((num_lines - 1) >> shift >= groups) ++shift;
    starts_ = {0, total};
    if (total > 0 && (num_lines - 1) >> shift > 0) {
      bring_together(shift, ((num_lines - 1) >> shift) + 1, parallel_for);
    }
    lines_.reset(new int64_t[total]);
    first_.assign(num_groups() + 1, 0);
    parallel_for(num_groups(), [&](int64_t group) { first_[group + 1] = place(group, num_lines); });
    for (int64_t group = 0; group < num_groups(); ++group) first_[group + 1] += first_[group];
  }

  // How many lines are hit.
  int64_t size() const { return first_.back(); }

  // Writes the lines, and the sums of their weights, [size, kLineWeights].
  template <typename ParallelFor>
  void write(int64_t* lines, float* sums, const ParallelFor& parallel_for) const {
    parallel_for(num_groups(), [&](int64_t group) {
      const int64_t first = first_[group];
      std::copy_n(lines_.get() + starts_[group], first_[group + 1] - first, lines + first);
      int64_t seen = 0;
      each_piece(group, [&](const LinePiece& piece) {
        seen = kernels_.add_to_lines(piece.begin, piece.size, seen, sums + first * kLineWeights);
      });
    });
  }

 private:
  // The sums of a group take up half a megabyte at most.
  static constexpr int64_t kPerGroup = 8192;
  // More could not be written to side by side.
  static constexpr int64_t kMostGroups = 256;

  int64_t num_groups() const { return static_cast<int64_t>(starts_.size()) - 1; }

  // A group is a piece, or all pieces are one group.
  template <typename Visit>
  void each_piece(int64_t group, const Visit& visit) const {
    if (together_ != nullptr) return visit(pieces_[group]);
    for (const LinePiece& piece : pieces_) visit(piece);
  }

  // Makes a piece of each group of neighbouring lines.
  template <typename ParallelFor>
  void bring_together(int shift, int64_t groups, const ParallelFor& parallel_for) {
    const auto num_pieces = static_cast<int64_t>(pieces_.size());
    std::vector<int64_t> next(num_pieces * groups, 0);  // where each piece writes, by group
    parallel_for(num_pieces, [&](int64_t p) {
      int64_t* counts = next.data() + p * groups;
      for (int64_t i = 0; i < pieces_[p].size; ++i) ++counts[pieces_[p].begin[i].line >> shift];
    });
    starts_.assign(groups + 1, 0);
    int64_t size = 0;
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t p = 0; p < num_pieces; ++p) {
        size += std::exchange(next[p * groups + group], size);
      }
      starts_[group + 1] = size;
    }
    together_.reset(new LineGradient[size]);
    parallel_for(num_pieces, [&](int64_t p) {
      int64_t* at = next.data() + p * groups;
      for (int64_t i = 0; i < pieces_[p].size; ++i) {
        const LineGradient& added = pieces_[p].begin[i];
        together_[at[added.line >> shift]++] = added;
      }
    });
    pieces_.clear();
    for (int64_t group = 0; group < groups; ++group) {
      pieces_.push_back({together_.get() + starts_[group], starts_[group + 1] - starts_[group]});
    }
  }

  // Puts places in the place of the lines of a group. Returns how many there are.
  int64_t place(int64_t group, int64_t num_lines) {
    const int64_t most = std::min(starts_[group + 1] - starts_[group], num_lines);
    std::vector<RowPlaces::Slot> slots(2 * std::bit_ceil(static_cast<uint64_t>(most) + 1),
                                       RowPlaces::kFree);
    RowPlaces places{slots.data(), slots.size() - 1, lines_.get() + starts_[group], 0};
    each_piece(group, [&](const LinePiece& piece) {
      kernels_.place_lines(piece.begin, piece.size, places);
    });
    return places.size;
  }

  const Kernels& kernels_;
  std::vector<LinePiece> pieces_;
  std::unique_ptr<LineGradient[]> together_;
  std::vector<int64_t> starts_;  // of each group, among all that is added
  std::unique_ptr<int64_t[]> lines_;
  std::vector<int64_t> first_;  // line of each group, among those that are hit
};

}  // namespace torchrec_cafe
