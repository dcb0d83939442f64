// Stands in for CUB's header of this name: what our sources call of it.
#pragma once

#include <algorithm>

#include "storage.h"

namespace cub {

struct DeviceSelect {
  // The first of each run of equal items, and how many there are.
  template <typename T, typename Count>
  static cudaError_t Unique(void* storage, size_t& bytes, const T* items, T* unique, Count* count,
                            int size, cudaStream_t stream) {
    return with_storage(storage, bytes, stream,
                        [&] { *count = std::unique_copy(items, items + size, unique) - unique; });
  }
};

}  // namespace cub
