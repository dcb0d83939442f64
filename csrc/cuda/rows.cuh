// Rows of either precision on the device.
#pragma once

#include <cuda_fp16.h>

namespace torchrec_cafe {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }

}  // namespace torchrec_cafe
