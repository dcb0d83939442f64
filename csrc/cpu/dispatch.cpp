#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace torchrec_cafe {

extern const Kernels kernels_default;
#if defined(CAFE_X86)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

namespace {

const Kernels& choose() {
#if defined(CAFE_X86)
  const char* wanted = std::getenv("CAFE_CPU_CAPABILITY");
  const auto allowed = [&](const Kernels& kernels) {
    return wanted == nullptr || std::strcmp(wanted, kernels.name) == 0;
  };
  if (__builtin_cpu_supports("x86-64-v4") && allowed(kernels_avx512)) return kernels_avx512;
  if (__builtin_cpu_supports("x86-64-v3") && allowed(kernels_avx2)) return kernels_avx2;
#endif
  return kernels_default;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& best = choose();
  return best;
}

}  // namespace torchrec_cafe
