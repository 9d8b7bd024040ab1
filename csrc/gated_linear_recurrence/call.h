// The call of the gated linear recurrence, as its bindings pass it to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

constexpr int kRecurrenceTaps = 4;

// Everything but x, out and grad_out is contiguous; parameters and hidden states have the type of the accumulator. Absent tensors
// are null.
struct GatedLinearRecurrence {
    DType dtype;
    int64_t B, T, N, H, D;  // C = H * D
    int num_threads;
    TensorView x;  // [B, T, N, C], adjacent channels
    // [4, C], [C], [H, D, D], [H, D], [H, D, D], [H, D], [C]
    const void *conv_weight, *conv_bias, *input_weight, *input_bias, *decay_weight, *decay_bias, *rate;
    const void *inputs, *hidden;  // the state before: [B, 3, N, C] of x's type, [B, N, C]
    TensorView out;               // [B, T, N, C], adjacent channels; contiguous in the forward pass
    void* new_hidden;             // forward: [B, N, C]
    TensorView grad_out;          // backward: as x
    const void* grad_new_hidden;
    void *grad_x, *grad_conv_weight, *grad_conv_bias, *grad_input_weight, *grad_input_bias, *grad_decay_weight;
    void *grad_decay_bias, *grad_rate, *grad_inputs, *grad_hidden;
};

TRITONKERN_DECLARE_KERNEL(gated_linear_recurrence, forward, GatedLinearRecurrence)
TRITONKERN_DECLARE_KERNEL(gated_linear_recurrence, backward, GatedLinearRecurrence)

}  // namespace tritonkern
