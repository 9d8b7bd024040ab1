// The call of temporal window attention, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

struct TemporalWindowAttention {
    DType dtype;
    int64_t B, T, N, H, D;
    int64_t left, right;  // frames seen before and after a query
    double scale;
    int num_threads;
    TensorView query, key, value;
    TensorView out;                               // forward
    void* lse;                                    // forward: [B, T, N, H], contiguous, in the type of the accumulator
    TensorView grad_out;                          // backward
    TensorView grad_query, grad_key, grad_value;  // backward
};

#define TRITONKERN_DECLARE(isa)                                                   \
    namespace isa {                                                               \
    void temporal_window_attention_forward(const TemporalWindowAttention& call);  \
    void temporal_window_attention_backward(const TemporalWindowAttention& call); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
