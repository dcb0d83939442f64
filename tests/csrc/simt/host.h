// The state of the device as the host code sees it, for the sources of this folder.
#pragma once

#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace simt {

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Host {
  cudaStream_t stream = reinterpret_cast<cudaStream_t>(uintptr_t{0x5eed});  // the current one
  int guards = 0;                                                           // device guards alive
  bool capturing = false;  // into a graph: nothing may wait for the device
  int launches = 0;
  int failing_launch = -1;   // the number of one that fails
  std::string error;         // of the last call
  std::vector<Copy> copies;  // to the host, not there yet
};
extern Host host;

}  // namespace simt
