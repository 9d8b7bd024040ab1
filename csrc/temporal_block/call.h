// The call of the temporal block, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

// x is [B, T, N, C] with adjacent channels. Parameters are contiguous and of the accumulator's type; an absent bias is null.
struct TemporalBlock {
    DType dtype;
    int64_t B, T, N, C, H;
    int64_t left, right;  // frames seen before and after a query
    double eps;
    int num_threads;
    const void* x;
    int64_t stride[3];  // of batch, frame and position
    // [C], [C], [3, H, C / H, C], [3, H, C / H], [C, C], [C]
    const void *norm_weight, *norm_bias, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias;
    void* out;  // contiguous
};

#define TRITONKERN_DECLARE(isa)                          \
    namespace isa {                                      \
    void temporal_block_forward(const TemporalBlock& c); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
