// The floor: how many random 64-byte lines of a buffer one thread can read, or read and write back,
// a second. Addresses are worked out beforehand, and each line is asked for `kAhead` lines early.
#include <cstdint>

namespace {

constexpr int64_t kAhead = 64;

struct Line {
  uint64_t words[8];
};

}  // namespace

extern "C" uint64_t read_lines(const Line* lines, const uint32_t* order, int64_t size) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) __builtin_prefetch(lines + order[i + kAhead]);
    for (const uint64_t word : lines[order[i]].words) sum += word;
  }
  return sum;
}

extern "C" void update_lines(Line* lines, const uint32_t* order, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (i + kAhead < size) __builtin_prefetch(lines + order[i + kAhead], 1);
    for (uint64_t& word : lines[order[i]].words) ++word;
  }
}
