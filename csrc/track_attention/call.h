// The call of track attention, as its bindings pass it to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

struct TrackAttention {
    DType dtype;
    int64_t B, T, M, height, width, H, D;
    double scale, inverse_variance;  // inverse_variance = 1 / (2 sigma^2), per square of a cell
    bool splat, culling;
    int num_threads;
    // All views are [B, T, height, width, H, D], tracks as a grid of height 1.
    TensorView query, key, value;
    const void* tracks;   // [B, T, M, 2] xy in cells, contiguous, in the type of the accumulator
    const bool* visible;  // [B, T, M], contiguous; null: all of them
    TensorView out;       // forward, contiguous
    TensorView grad_out;  // backward
    TensorView grad_query, grad_key, grad_value;  // backward, contiguous
    void *grad_tracks, *grad_inverse_variance;    // backward: like tracks, and one number; null where not wanted
};

TRITONKERN_DECLARE_KERNEL(track_attention, forward, TrackAttention)
TRITONKERN_DECLARE_KERNEL(track_attention, backward, TrackAttention)

}  // namespace tritonkern
