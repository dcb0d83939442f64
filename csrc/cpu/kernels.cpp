// Compiled once for each instruction set, with CAFE_KERNELS the name of the table it defines. Uses
// no template or inline function of the standard library: the linker could take this file's copy of
// it, made for a newer machine, for the whole program.
#include "cpu/kernels.h"

#include "cpu/bloom_kernel.h"
#include "cpu/factor_kernel.h"
#include "cpu/importance_kernel.h"
#include "cpu/line_gradients_kernel.h"
#include "cpu/mix_kernel.h"
#include "cpu/observe_kernel.h"
#include "cpu/rebalance_kernel.h"
#include "cpu/remap_kernel.h"

namespace torchrec_cafe {

extern const Kernels CAFE_KERNELS;
const Kernels CAFE_KERNELS{
    CAFE_CAPABILITY, mix,           shards_fit,  observe,        observe_owned,
    bag_norms,       weigh,         renormalise, offsets_ascend, remap,
    bloom_encode,    key_factors,   gather,      line_gradients, place_lines,
    add_to_lines,    bloom_factors, bloom_pool,  bloom_dots,     rebalance};

}  // namespace torchrec_cafe
