// Temporary storage as CUB asks for it: called without, a function only says how much it needs.
#pragma once

#include <cstring>

#include "../../cuda_runtime.h"

namespace cub {

inline constexpr size_t kStorageBytes = 1000;

// Calls run() with storage; without, says how much. Storage is written all over, as CUB may.
template <typename Run>
cudaError_t with_storage(void* storage, size_t& bytes, cudaStream_t stream, const Run& run) {
  if (storage == nullptr) {
    bytes = kStorageBytes;
    return cudaSuccess;
  }
  if (bytes < kStorageBytes)
    return simt::refuse(cudaErrorInvalidValue, "too little storage for CUB");
  if (const cudaError_t error = simt::check_stream(stream); error != cudaSuccess) return error;
  memset(storage, 0xa5, kStorageBytes);
  run();
  return cudaSuccess;
}

}  // namespace cub
