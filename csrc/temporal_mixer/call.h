// The call of the temporal mixer, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include <algorithm>

#include "common/tensor.h"

namespace tritonkern {

// Frames of C adjacent numbers, anywhere in memory: strides of batch, track and frame.
struct FrameView {
    void* data = nullptr;
    int64_t stride[3] = {0, 0, 0};
};

// x is [B, N, T, C]. Parameters, states and partial sums are contiguous and of the accumulator's type; what is absent is
// null.
struct TemporalMixer {
    DType dtype;
    int64_t B, N, T, C;
    bool causal;
    double eps;
    int num_threads;
    FrameView x;
    // [C], [4C, 3], [4C], [4C, 3], [4C]: channel 4c + j of the convolutions belongs to channel c of x.
    const void *norm_weight, *conv1_weight, *conv1_bias, *conv2_weight, *conv2_bias;
    // The two frames before the clip, normalised [B, N, 2, C] and behind the first convolution [B, N, 2, 4C].
    const void *normed_state, *hidden_state;
    void *out, *new_normed_state, *new_hidden_state;  // forward
    FrameView grad_out;                               // backward
    void* grad_x;
    // Backward: for every `chunk` tasks their part of the parameters' gradients, [chunks, 30, C]: weights of the first
    // convolution (j, then tap) and its biases, weights of the second and its one bias, the norm's weight.
    void* partial;
    int64_t chunk;

    // Long sequences are cut into stretches whose rows stay in the second-level cache.
    int64_t stretch() const { return std::clamp<int64_t>(16384 / C, 8, 32); }
    int64_t stretches() const { return (T + stretch() - 1) / stretch(); }
    int64_t tasks() const { return B * N * stretches(); }
};

#define TRITONKERN_DECLARE(isa)                           \
    namespace isa {                                       \
    void temporal_mixer_forward(const TemporalMixer& c);  \
    void temporal_mixer_backward(const TemporalMixer& c); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
