#include <sys/mman.h>
#include <torch/csrc/stable/library.h>

#include "checks.h"

namespace torchrec_cafe {
namespace {

// Asks for huge pages under the tensor, before it is first written: random reads of a large sketch
// would otherwise wait for the page table as often as for the data. A wish that may go unheard.
void advise_huge_pages(const Tensor& tensor) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchrec_cafe, CPU, m) {
  m.impl("advise_huge_pages", TORCH_BOX(&advise_huge_pages));
}

}  // namespace torchrec_cafe
