// Bindings of the gated linear recurrence. x, out and grad_out are [B, T, N, C] of any strides but that of the channels.
#include "common/bindings.h"

#include "gated_linear_recurrence/call.h"

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

GatedLinearRecurrence describe(const TensorView& x, const TensorView& conv_weight, const TensorView& conv_bias,
                               const TensorView& input_gate_weight, const TensorView& input_gate_bias,
                               const TensorView& decay_gate_weight, const TensorView& decay_gate_bias,
                               const TensorView& rate, const TensorView& inputs, const TensorView& hidden,
                               int num_threads) {
    expect_rank("x", x, 4);
    expect_floating("x", x);
    expect_adjacent_channels("x", x);
    if (is_empty(x)) throw std::invalid_argument("x must not be empty");
    expect_rank("input_gate_weight", input_gate_weight, 3);
    GatedLinearRecurrence call{};
    call.dtype = x.dtype, call.num_threads = num_threads, call.x = x;
    call.B = x.shape[0], call.T = x.shape[1], call.N = x.shape[2];
    const int64_t H = call.H = input_gate_weight.shape[0], D = call.D = input_gate_weight.shape[1], C = x.shape[3];
    if (H * D != C)
        throw std::invalid_argument("input_gate_weight must have as many rows as x has channels, got shape " +
                                    text_of(3, input_gate_weight.shape));
    const DType wide = accumulator(x.dtype);
    call.conv_weight = contiguous("conv_weight", conv_weight, wide, {kRecurrenceTaps, C});
    call.conv_bias = contiguous("conv_bias", conv_bias, wide, {C});
    call.input_weight = contiguous("input_gate_weight", input_gate_weight, wide, {H, D, D});
    call.input_bias = contiguous("input_gate_bias", input_gate_bias, wide, {H, D});
    call.decay_weight = contiguous("decay_gate_weight", decay_gate_weight, wide, {H, D, D});
    call.decay_bias = contiguous("decay_gate_bias", decay_gate_bias, wide, {H, D});
    call.rate = contiguous("rate", rate, wide, {C});
    call.inputs = optional("inputs", inputs, x.dtype, {call.B, kRecurrenceTaps - 1, call.N, C});
    call.hidden = optional("hidden", hidden, wide, {call.B, call.N, C});
    if (!call.inputs != !call.hidden) throw std::invalid_argument("inputs and hidden must be tensors, or None both");
    return call;
}

void forward(const TensorView& x, const TensorView& conv_weight, const TensorView& conv_bias,
             const TensorView& input_gate_weight, const TensorView& input_gate_bias,
             const TensorView& decay_gate_weight, const TensorView& decay_gate_bias, const TensorView& rate,
             const TensorView& inputs, const TensorView& hidden, int num_threads, const TensorView& out,
             const TensorView& new_hidden) {
    auto call = describe(x, conv_weight, conv_bias, input_gate_weight, input_gate_bias, decay_gate_weight,
                         decay_gate_bias, rate, inputs, hidden, num_threads);
    expect_like("out", out, x);
    expect_contiguous("out", out);
    call.out = out;
    call.new_hidden = contiguous("new_hidden", new_hidden, accumulator(x.dtype), {call.B, call.N, x.shape[3]});
    TRITONKERN_KERNEL(gated_linear_recurrence, forward)(call);
}

void backward(const TensorView& grad_out, const TensorView& grad_new_hidden, const TensorView& x,
              const TensorView& conv_weight, const TensorView& conv_bias, const TensorView& input_gate_weight,
              const TensorView& input_gate_bias, const TensorView& decay_gate_weight, const TensorView& decay_gate_bias,
              const TensorView& rate, const TensorView& inputs, const TensorView& hidden, const TensorView& out,
              int num_threads, const TensorView& grad_x, const TensorView& grad_conv_weight,
              const TensorView& grad_conv_bias, const TensorView& grad_input_gate_weight,
              const TensorView& grad_input_gate_bias, const TensorView& grad_decay_gate_weight,
              const TensorView& grad_decay_gate_bias, const TensorView& grad_rate, const TensorView& grad_inputs,
              const TensorView& grad_hidden) {
    auto call = describe(x, conv_weight, conv_bias, input_gate_weight, input_gate_bias, decay_gate_weight,
                         decay_gate_bias, rate, inputs, hidden, num_threads);
    const int64_t B = call.B, N = call.N, H = call.H, D = call.D, C = x.shape[3];
    const DType wide = accumulator(x.dtype);
    expect_like("grad_out", grad_out, x);
    expect_adjacent_channels("grad_out", grad_out);
    expect_like("out", out, x);
    expect_adjacent_channels("out", out);
    call.grad_out = grad_out, call.out = out;
    call.grad_new_hidden = optional("grad_new_hidden", grad_new_hidden, wide, {B, N, C});
    call.grad_x = optional("grad_x", grad_x, call.dtype, {B, call.T, N, C});
    call.grad_conv_weight = optional("grad_conv_weight", grad_conv_weight, wide, {kRecurrenceTaps, C});
    call.grad_conv_bias = optional("grad_conv_bias", grad_conv_bias, wide, {C});
    call.grad_input_weight = optional("grad_input_gate_weight", grad_input_gate_weight, wide, {H, D, D});
    call.grad_input_bias = optional("grad_input_gate_bias", grad_input_gate_bias, wide, {H, D});
    call.grad_decay_weight = optional("grad_decay_gate_weight", grad_decay_gate_weight, wide, {H, D, D});
    call.grad_decay_bias = optional("grad_decay_gate_bias", grad_decay_gate_bias, wide, {H, D});
    call.grad_rate = optional("grad_rate", grad_rate, wide, {C});
    call.grad_inputs = optional("grad_inputs", grad_inputs, call.dtype, {B, kRecurrenceTaps - 1, N, C});
    call.grad_hidden = optional("grad_hidden", grad_hidden, wide, {B, N, C});
    if ((call.grad_inputs || call.grad_hidden) && !call.hidden)
        throw std::invalid_argument("grad_inputs and grad_hidden belong to a state");
    TRITONKERN_KERNEL(gated_linear_recurrence, backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("gated_linear_recurrence_forward", forward, arg("x"), arg("conv_weight"), arg("conv_bias"),
          arg("input_gate_weight"), arg("input_gate_bias"), arg("decay_gate_weight"), arg("decay_gate_bias"),
          arg("rate"), arg("inputs"), arg("hidden"), arg("num_threads"), arg("out"), arg("new_hidden"), Unlocked());
    m.def("gated_linear_recurrence_backward", backward, arg("grad_out"), arg("grad_new_hidden"), arg("x"),
          arg("conv_weight"), arg("conv_bias"), arg("input_gate_weight"), arg("input_gate_bias"),
          arg("decay_gate_weight"), arg("decay_gate_bias"), arg("rate"), arg("inputs"), arg("hidden"), arg("out"),
          arg("num_threads"), arg("grad_x"), arg("grad_conv_weight"), arg("grad_conv_bias"),
          arg("grad_input_gate_weight"), arg("grad_input_gate_bias"), arg("grad_decay_gate_weight"),
          arg("grad_decay_gate_bias"), arg("grad_rate"), arg("grad_inputs"), arg("grad_hidden"), Unlocked());
}

}  // namespace tritonkern
