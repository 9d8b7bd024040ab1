// The call of softmax attention, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

// query [B, L, H, D], key and value [B, S, H, D] with adjacent channels; strides are those of B, L or S, and H.
struct FullAttention {
    DType dtype;
    int64_t B, L, S, H, D;
    double scale;
    int num_threads;
    const void *query, *key, *value;
    int64_t query_stride[3], key_stride[3], value_stride[3];
    void* out;  // [B, L, H, D], contiguous
    void* lse;  // [B, L, H], contiguous, of the accumulator's type
};

#define TRITONKERN_DECLARE(isa)                             \
    namespace isa {                                         \
    void full_attention_forward(const FullAttention& call); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
