// The call of softmax attention, as its bindings pass it to the kernel.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

// query [B, L, H, D], key and value [B, S, H, D] with adjacent channels.
struct FullAttention {
    DType dtype;
    int64_t B, L, S, H, D;
    double scale;
    int num_threads;
    TensorView query, key, value;
    void* out;  // [B, L, H, D], contiguous
    void* lse;  // [B, L, H], contiguous, of the accumulator's type
};

TRITONKERN_DECLARE_KERNEL(full_attention, forward, FullAttention)

}  // namespace tritonkern
