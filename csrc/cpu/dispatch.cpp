#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace torchrec_cafe {

extern const Kernels kernels_default;
#if defined(CAFE_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif

namespace {

const Kernels& choose() {
#if defined(CAFE_HAVE_AVX2)
  const char* wanted = std::getenv("CAFE_CPU_CAPABILITY");
  const bool plain = wanted != nullptr && std::strcmp(wanted, kernels_default.name) == 0;
  if (!plain && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
    return kernels_avx2;
  }
#endif
  return kernels_default;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& best = choose();
  return best;
}

}  // namespace torchrec_cafe
