// The calls of local correlation, as its bindings pass them to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

constexpr int64_t kMaxLocalRadius = 15;

// The kernels have a slow and a fast axis of offsets: rows and columns. Where x is the slow one, they get the map transposed.
// Strides may have any value; channels of gradients, and the numbers of a row, are adjacent.
struct LocalCorrelation {
    DType dtype;       // of features and support
    DType rows_dtype;  // of out and grad_out: the same, or that of sums
    int64_t B, T, N, height, width, C, S, radius;
    bool zeros;            // beyond the map: zeros, else its border repeated
    bool supports_differ;  // from frame to frame
    bool x_is_fast;        // position is (fast, slow), else (slow, fast)
    double scale;          // forward, of the softmax over the samples; 0: none
    int num_threads;
    TensorView features;       // [B, T, height, width, C]
    TensorView support;        // [B, N, T, S, C]; the stride of T is 0 unless supports_differ
    TensorView position;       // [B, T, N, 2] in the type of sums, in cells, whose centres are whole numbers
    TensorView rows;           // out or grad_out, [B, T, N, P * S]
    TensorView grad_features;  // backward, added to, in the type of sums, as features; null where not needed
    TensorView grad_support;   // as support
    TensorView grad_position;  // as position
};

// out[m, n] (+)= sum over k of left[m, k] right[k, n]
struct LocalCorrelationProduct {
    DType dtype;  // float64 or float32, of all three
    int64_t M, K, N;
    bool add;
    int num_threads;
    TensorView left;  // [M, K], adjacent numbers along one of its axes
    TensorView right;
    TensorView out;  // contiguous
};

// The gradient of the softmax over P samples, in place: that of its results -> that of what it was taken of.
struct LocalCorrelationSoftmax {
    DType dtype;  // float64 or float32, of both
    int64_t rows, P, S;
    double scale;
    int num_threads;
    TensorView weights;  // [rows, P * S], contiguous
    TensorView grad;     // as weights
};

TRITONKERN_DECLARE_KERNEL(local_correlation, forward, LocalCorrelation)
TRITONKERN_DECLARE_KERNEL(local_correlation, backward, LocalCorrelation)
TRITONKERN_DECLARE_KERNEL(local_correlation, multiply, LocalCorrelationProduct)
TRITONKERN_DECLARE_KERNEL(local_correlation, softmax_backward, LocalCorrelationSoftmax)

}  // namespace tritonkern
