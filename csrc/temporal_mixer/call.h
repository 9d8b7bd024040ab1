// The call of the temporal mixer, as its bindings pass it to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

// Rows of the parameters' gradients: weights of the first convolution (j, then tap) and its biases, weights of the second and its
// one bias, the norm's weight.
constexpr int kMixerSums = 30;

// Everything but x and grad_out is contiguous; parameters, states and sums have the type of the accumulator. Absent tensors are
// null.
struct TemporalMixer {
    DType dtype;
    int64_t B, N, T, C;
    bool causal;
    double eps;
    int num_threads;
    TensorView x;  // [B, N, T, C], adjacent channels
    // [C], [4C, 1, 3], [4C], [4C, 1, 3], [4C]: channel 4c + j of the convolutions belongs to channel c of x.
    const void *norm_weight, *conv1_weight, *conv1_bias, *conv2_weight, *conv2_bias;
    // The two frames before the clip, normalised [B, N, 2, C] and after the first convolution [B, N, 2, 4C].
    const void *normed_state, *hidden_state;
    void *out, *new_normed_state, *new_hidden_state;  // forward
    TensorView grad_out;                              // backward: [B, N, T, C], adjacent channels
    void *grad_x, *sums;                              // backward: [B, N, T, C], [kMixerSums, C]
};

TRITONKERN_DECLARE_KERNEL(temporal_mixer, forward, TemporalMixer)
TRITONKERN_DECLARE_KERNEL(temporal_mixer, backward, TemporalMixer)

}  // namespace tritonkern
