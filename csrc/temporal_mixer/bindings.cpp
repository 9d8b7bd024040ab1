// Bindings of the temporal mixer. x and grad_out are [B, N, T, C] of any strides but that of the channels.
#include "common/bindings.h"

#include "temporal_mixer/call.h"

namespace tritonkern {
namespace {

// Its address, or null for None.
void* contiguous(const char* name, const TensorView& x, DType dtype, std::initializer_list<int64_t> shape) {
    expect(name, x, dtype, shape);
    expect_contiguous(name, x);
    return x.data;
}
void* optional(const char* name, const TensorView& x, DType dtype, std::initializer_list<int64_t> shape) {
    return x.rank < 0 ? nullptr : contiguous(name, x, dtype, shape);
}

TemporalMixer describe(const TensorView& x, const TensorView& norm_weight, const TensorView& conv1_weight,
                       const TensorView& conv1_bias, const TensorView& conv2_weight, bool causal, double eps,
                       int num_threads) {
    expect_rank("x", x, 4);
    expect_floating("x", x);
    expect_adjacent_channels("x", x);
    TemporalMixer call{};
    call.dtype = x.dtype, call.causal = causal, call.eps = eps, call.num_threads = num_threads, call.x = x;
    call.B = x.shape[0], call.N = x.shape[1], call.T = x.shape[2], call.C = x.shape[3];
    if (!call.B || !call.N || !call.T || !call.C) throw std::invalid_argument("x must not be empty");
    const DType wide = accumulator(x.dtype);
    call.norm_weight = contiguous("norm_weight", norm_weight, wide, {call.C});
    call.conv1_weight = contiguous("conv1_weight", conv1_weight, wide, {4 * call.C, 1, 3});
    call.conv1_bias = contiguous("conv1_bias", conv1_bias, wide, {4 * call.C});
    call.conv2_weight = contiguous("conv2_weight", conv2_weight, wide, {4 * call.C, 1, 3});
    return call;
}

void forward(const TensorView& x, const TensorView& norm_weight, const TensorView& conv1_weight,
             const TensorView& conv1_bias, const TensorView& conv2_weight, const TensorView& conv2_bias, bool causal,
             double eps, const TensorView& normed_state, const TensorView& hidden_state, int num_threads,
             const TensorView& out, const TensorView& new_normed_state, const TensorView& new_hidden_state) {
    auto call = describe(x, norm_weight, conv1_weight, conv1_bias, conv2_weight, causal, eps, num_threads);
    const DType wide = accumulator(x.dtype);
    call.conv2_bias = contiguous("conv2_bias", conv2_bias, wide, {4 * call.C});
    call.out = contiguous("out", out, call.dtype, {call.B, call.N, call.T, call.C});
    call.normed_state = optional("normed_state", normed_state, wide, {call.B, call.N, 2, call.C});
    call.hidden_state = optional("hidden_state", hidden_state, wide, {call.B, call.N, 2, 4 * call.C});
    call.new_normed_state = optional("new_normed_state", new_normed_state, wide, {call.B, call.N, 2, call.C});
    call.new_hidden_state = optional("new_hidden_state", new_hidden_state, wide, {call.B, call.N, 2, 4 * call.C});
    const bool carries = normed_state.rank >= 0;
    for (const TensorView& state : {hidden_state, new_normed_state, new_hidden_state})
        if ((state.rank >= 0) != carries) throw std::invalid_argument("all four states must be tensors, or none");
    if (carries && !causal) throw std::invalid_argument("normed_state belongs to a causal mixer");
    TRITONKERN_KERNEL(temporal_mixer, forward)(call);
}

void backward(const TensorView& grad_out, const TensorView& x, const TensorView& norm_weight,
              const TensorView& conv1_weight, const TensorView& conv1_bias, const TensorView& conv2_weight, bool causal,
              double eps, int num_threads, const TensorView& grad_x, const TensorView& sums) {
    auto call = describe(x, norm_weight, conv1_weight, conv1_bias, conv2_weight, causal, eps, num_threads);
    expect_like("grad_out", grad_out, x);
    expect_adjacent_channels("grad_out", grad_out);
    call.grad_out = grad_out;
    call.grad_x = optional("grad_x", grad_x, call.dtype, {call.B, call.N, call.T, call.C});
    call.sums = optional("sums", sums, accumulator(x.dtype), {kMixerSums, call.C});
    TRITONKERN_KERNEL(temporal_mixer, backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("temporal_mixer_forward", forward, arg("x"), arg("norm_weight"), arg("conv1_weight"), arg("conv1_bias"),
          arg("conv2_weight"), arg("conv2_bias"), arg("causal"), arg("eps"), arg("normed_state"), arg("hidden_state"),
          arg("num_threads"), arg("out"), arg("new_normed_state"), arg("new_hidden_state"), Unlocked());
    m.def("temporal_mixer_backward", backward, arg("grad_out"), arg("x"), arg("norm_weight"), arg("conv1_weight"),
          arg("conv1_bias"), arg("conv2_weight"), arg("causal"), arg("eps"), arg("num_threads"), arg("grad_x"),
          arg("sums"), Unlocked());
}

}  // namespace tritonkern
