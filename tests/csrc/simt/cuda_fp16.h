// Stands in for CUDA's header of this name: see cuda_runtime.h.
#pragma once

using __half = _Float16;

inline float __half2float(__half x) { return static_cast<float>(x); }
