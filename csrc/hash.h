// Integer hashing shared by host and device. Torch-free.
#pragma once

#include <cstdint>

// Always inlined: cpu/ compiles the same headers for several instruction sets, and the linker must
// not choose one set's copy of a function for all of them.
#if defined(__CUDACC__)
#define CAFE_HOST_DEVICE __host__ __device__ __attribute__((always_inline))
#else
#define CAFE_HOST_DEVICE __attribute__((always_inline))
#endif

namespace torchrec_cafe {

// High 64 bits of the 128-bit product a * b.
CAFE_HOST_DEVICE inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using uint128 = unsigned __int128;
  return static_cast<uint64_t>((static_cast<uint128>(a) * b) >> 64);
#endif
}

// MurmurHash3's 64-bit finaliser: a bijection in which every input bit flips every output bit with
// probability close to one half.
CAFE_HOST_DEVICE inline uint64_t hash64(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  x ^= x >> 33;
  return x;
}

// Maps the upper half of a hash uniformly onto [0, n) without a division; n < 2^32. Products of 32
// bits are what vector units have.
CAFE_HOST_DEVICE inline int64_t reduce_hash(uint64_t hash, uint32_t n) {
  return static_cast<int64_t>((hash >> 32) * n >> 32);
}

// Number of bits needed to write n - 1, that is, the smallest b with 2^b >= n, for n >= 1.
CAFE_HOST_DEVICE inline int ceil_log2(uint64_t n) {
  int bits = 0;
  while (bits < 63 && (uint64_t{1} << bits) < n) ++bits;
  return bits;
}

// A fixed bijection of [0, n). Ids sorted by frequency are the norm, so neighbouring ids must not
// stay neighbours: contiguous ranges would put every popular id on the first rank, and every
// popular id into the first shared rows.
//
// A round permutes the words of ceil_log2(n) bits (xor-shift and odd multiplication are bijections
// of them); rounds are repeated until the word is back below n: at most two on average.
struct Mixer {
  uint64_t n;
  uint64_t mask;
  int shift;

  CAFE_HOST_DEVICE explicit Mixer(int64_t size)
      : n(static_cast<uint64_t>(size)),
        mask((uint64_t{1} << ceil_log2(n)) - 1),
        shift((ceil_log2(n) + 1) / 2) {}

  CAFE_HOST_DEVICE uint64_t round(uint64_t x) const {
    x ^= x >> shift;
    x = (x * 0xff51afd7ed558ccdULL + 0x9e3779b97f4a7c15ULL) & mask;
    x ^= x >> shift;
    x = (x * 0xc4ceb9fe1a85ec53ULL + 0xbf58476d1ce4e5b9ULL) & mask;
    x ^= x >> shift;
    x = (x * 0x94d049bb133111ebULL) & mask;
    return x ^ (x >> shift);
  }

  // Two ids or one are too few to mix.
  CAFE_HOST_DEVICE bool is_identity() const { return n <= 2; }
};

CAFE_HOST_DEVICE inline int64_t mix_id(int64_t id, int64_t n) {
  const Mixer mixer(n);
  if (mixer.is_identity()) return id;
  uint64_t x = static_cast<uint64_t>(id);
  do {
    x = mixer.round(x);
  } while (x >= mixer.n);
  return static_cast<int64_t>(x);
}

}  // namespace torchrec_cafe
