// What CUDA C++ has for device code, as far as our kernels use it, and its neighbours.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static __attribute__((section("simt_shared")))

inline constexpr const simt::Index& threadIdx = simt::place.thread;
inline constexpr const simt::Index& blockIdx = simt::place.block;
inline constexpr const simt::Index& blockDim = simt::place.threads;
inline constexpr const simt::Index& gridDim = simt::place.blocks;

inline constexpr int warpSize = static_cast<int>(simt::kWarp);

namespace simt {

enum class Kind { kRead, kWrite, kAtomic };

// What a thread does to memory; `code` is where.
void access(const void* address, size_t size, Kind kind, const void* code);
// Malformed input may make threads write the same, in bounds: then races are none of our business.
void detect_races(bool on);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T read_lane(const Thread& thread, int lane) {
  if ((thread.present >> lane & 1) == 0) {
    fail("a shuffle reads lane " + std::to_string(lane) + ", which does not take part");
  }
  return from_bits<T>(thread.brought[static_cast<size_t>(lane)]);
}

}  // namespace simt

// --- barriers ------------------------------------------------------------------------------------

using simt_where = std::source_location;

inline void __syncthreads(simt_where where = simt_where::current()) {
  simt::wait_for_block(0, where);
}
inline int __syncthreads_count(int predicate, simt_where where = simt_where::current()) {
  return static_cast<int>(simt::wait_for_block(predicate != 0, where));
}
inline int __syncthreads_or(int predicate, simt_where where = simt_where::current()) {
  return simt::wait_for_block(predicate != 0, where) > 0;
}
inline int __syncthreads_and(int predicate, simt_where where = simt_where::current()) {
  return simt::wait_for_block(predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt_where where = simt_where::current()) {
  simt::wait_for_lanes(simt::Operation::kWarpSync, mask, 0, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- shuffles and votes --------------------------------------------------------------------------

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              simt_where where = simt_where::current()) {
  const simt::Thread& self =
      simt::wait_for_lanes(simt::Operation::kShuffle, mask, simt::to_bits(value), where);
  const int own = static_cast<int>(self.lane());
  return simt::read_lane<T>(self, own / width * width + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = warpSize,
                  simt_where where = simt_where::current()) {
  const simt::Thread& self =
      simt::wait_for_lanes(simt::Operation::kShuffle, mask, simt::to_bits(value), where);
  const int own = static_cast<int>(self.lane());
  const int from = own ^ other;
  return from / width > own / width ? value : simt::read_lane<T>(self, from);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                 simt_where where = simt_where::current()) {
  const simt::Thread& self =
      simt::wait_for_lanes(simt::Operation::kShuffle, mask, simt::to_bits(value), where);
  const int own = static_cast<int>(self.lane());
  const int from = own - static_cast<int>(by);
  return from < own / width * width ? value : simt::read_lane<T>(self, from);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize,
                   simt_where where = simt_where::current()) {
  const simt::Thread& self =
      simt::wait_for_lanes(simt::Operation::kShuffle, mask, simt::to_bits(value), where);
  const int own = static_cast<int>(self.lane());
  const int from = own + static_cast<int>(by);
  return from >= (own / width + 1) * width ? value : simt::read_lane<T>(self, from);
}
// Lanes of the mask that brought the same.
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, simt_where where = simt_where::current()) {
  const uint64_t bits = simt::to_bits(value);
  const simt::Thread& self = simt::wait_for_lanes(simt::Operation::kVote, mask, bits, where);
  unsigned same = 0;
  for (unsigned lane = 0; lane < simt::kWarp; ++lane) {
    same |= static_cast<unsigned>((self.present >> lane & 1) && self.brought[lane] == bits) << lane;
  }
  return same;
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt_where where = simt_where::current()) {
  const simt::Thread& self =
      simt::wait_for_lanes(simt::Operation::kVote, mask, predicate != 0, where);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < simt::kWarp; ++lane) {
    votes |= static_cast<unsigned>((self.present >> lane & 1) && self.brought[lane]) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, simt_where where = simt_where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt_where where = simt_where::current()) {
  return __ballot_sync(mask, predicate == 0, where) == 0;
}

// --- atomic operations: each a chance for other threads to run -----------------------------------

template <typename T>
concept AtomicWord =
    std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long> ||
    std::same_as<T, float> || std::same_as<T, double>;

template <AtomicWord T, typename Change>
__attribute__((noinline, no_sanitize("thread"))) T simt_atomic(T* address, Change change) {
  simt::access(address, sizeof(T), simt::Kind::kAtomic, __builtin_return_address(0));
  const T old = *address;
  *address = change(old);
  return old;
}
template <AtomicWord T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T old) { return old + value; });
}
template <AtomicWord T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T) { return value; });
}
template <AtomicWord T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T old) { return old == expected ? value : old; });
}
template <AtomicWord T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T old) { return old < value ? old : value; });
}
template <AtomicWord T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T old) { return old > value ? old : value; });
}
template <AtomicWord T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T old) { return old | value; });
}
template <AtomicWord T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return simt_atomic(address, [=](T old) { return old & value; });
}

// --- arithmetic ----------------------------------------------------------------------------------

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
