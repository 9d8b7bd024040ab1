// The calls of the correlation with soft-argmax, as its bindings pass them to the kernels. Pointers are to contiguous tensors
// in the type of the accumulator, where nothing else is said.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

struct CorrelationSoftArgmax {
    DType dtype;
    int64_t B, N, T, height, width, C;
    double temperature, eps;
    int64_t limit;  // cells of the disc have a squared distance below this to the best one
    bool cosine;
    int num_threads;
    TensorView query;     // [B, N, C], channels adjacent
    TensorView features;  // [B, T, height, width, C], channels adjacent
    // Results of the forward pass, which the backward pass reads: all [B, N, T] but for points, [B, N, T, 2].
    void *points, *mean, *maximum, *minimum, *weight;
    int32_t *best, *worst;
    void *query_inverse_norm, *features_inverse_norm;  // [B, N] and [B, T, height, width], if cosine
    // Backward: gradients of the results, null where there is none; then the results, of the call's dtype.
    const void *grad_points, *grad_mean, *grad_maximum, *grad_minimum;
    void *grad_query, *grad_features;
};

struct SoftArgmax2d {
    DType dtype;
    int64_t frames[3], height, width;
    double temperature;
    int64_t limit;
    int num_threads;
    TensorView cost;  // [frames, height, width]
    void *points, *maximum, *weight;
    int32_t* best;
    const void* grad_points;
    void* grad_cost;  // of the call's dtype
};

TRITONKERN_DECLARE_KERNEL(correlation_soft_argmax, forward, CorrelationSoftArgmax)
TRITONKERN_DECLARE_KERNEL(correlation_soft_argmax, backward, CorrelationSoftArgmax)
TRITONKERN_DECLARE_KERNEL(correlation_soft_argmax, soft_argmax_2d_forward, SoftArgmax2d)
TRITONKERN_DECLARE_KERNEL(correlation_soft_argmax, soft_argmax_2d_backward, SoftArgmax2d)

}  // namespace tritonkern
