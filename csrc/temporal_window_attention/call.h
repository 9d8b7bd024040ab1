// The call of temporal window attention, as its bindings pass it to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

struct TemporalWindowAttention {
    DType dtype;
    int64_t B, T, N, H, D;
    int64_t S;            // frames of keys and values, at least offset + T
    int64_t offset;       // the key frame of query frame 0
    int64_t start;        // forward: key frame j is stored in row (start + j) % S
    int64_t left, right;  // frames seen before and after a query
    double scale;
    int num_threads;
    TensorView query, key, value;                 // [B, T, N, H, D] and, of keys and values, [B, S, N, H, D]
    TensorView out;                               // forward
    void* lse;                                    // forward: [B, T, N, H], contiguous, in the type of the accumulator
    TensorView grad_out;                          // backward
    TensorView grad_query, grad_key, grad_value;  // backward
};

TRITONKERN_DECLARE_KERNEL(temporal_window_attention, forward, TemporalWindowAttention)
TRITONKERN_DECLARE_KERNEL(temporal_window_attention, backward, TemporalWindowAttention)

}  // namespace tritonkern
