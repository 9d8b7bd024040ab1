// The calls of the correlation with soft-argmax, as the bindings hand them to the kernels of one instruction set. Tensors
// are contiguous, in the type of the accumulator, where nothing else is said.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

struct CorrelationSoftArgmax {
    DType dtype;
    int64_t B, N, T, height, width, C;
    double temperature, radius, eps;
    bool cosine;
    int num_threads;
    TensorView query;     // [B, N, C], channels contiguous
    TensorView features;  // [B, T, height, width, C], channels contiguous
    // Results of the forward pass, which the backward pass reads: all [B, N, T] but for points, [B, N, T, 2].
    void *points, *mean, *maximum, *minimum, *weight;
    int32_t *best, *worst;
    void *query_scale, *features_scale;  // [B, N] and [B, T, height, width], if cosine
    // Backward: gradients of the results, null where there is none; then the results, contiguous, of the call's dtype.
    const void *grad_points, *grad_mean, *grad_maximum, *grad_minimum;
    void *grad_query, *grad_features;
};

struct SoftArgmax {
    DType dtype;
    int64_t frames[3], height, width;
    double temperature, radius;
    int num_threads;
    TensorView cost;  // [frames, height, width]
    void *points, *maximum, *weight;
    int32_t* best;
    const void* grad_points;
    void* grad_cost;  // contiguous, of the call's dtype
};

#define TRITONKERN_DECLARE(isa)                                               \
    namespace isa {                                                           \
    void correlation_soft_argmax_forward(const CorrelationSoftArgmax& call);  \
    void correlation_soft_argmax_backward(const CorrelationSoftArgmax& call); \
    void soft_argmax_forward(const SoftArgmax& call);                         \
    void soft_argmax_backward(const SoftArgmax& call);                        \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
