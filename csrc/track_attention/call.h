// The call of attention between tracks and a grid, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

// A [B, T, height, width, H, D] tensor; tracks are a grid of height 1. Strides count elements and may have any value.
struct VideoView {
    void* data = nullptr;
    int64_t stride[6] = {0, 0, 0, 0, 0, 0};
};

struct TrackAttention {
    DType dtype;
    int64_t B, T, M, height, width, H, D;
    double scale, precision;  // precision = 1 / (2 sigma^2)
    bool splat, culling;
    int num_threads;
    VideoView query, key, value;
    const void* tracks;                          // [B, T, M, 2] xy, contiguous, in the type of the accumulator
    const bool* visible;                         // [B, T, M], contiguous
    VideoView out;                               // forward, contiguous
    void* lse;                                   // forward: [B, T, rows, H], contiguous, in the type of the accumulator
    VideoView grad_out;                          // backward
    VideoView grad_query, grad_key, grad_value;  // backward, contiguous
    void *grad_tracks, *grad_precision;          // backward: as tracks, and one number; null where not wanted
};

#define TRITONKERN_DECLARE(isa)                                \
    namespace isa {                                            \
    void track_attention_forward(const TrackAttention& call);  \
    void track_attention_backward(const TrackAttention& call); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
