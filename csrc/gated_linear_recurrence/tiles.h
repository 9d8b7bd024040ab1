// A task's tiles: the channels of one head of some sequences, in one frame.
#pragma once

#include <algorithm>

#include "common/product.h"
#include "common/rows.h"
#include "gated_linear_recurrence/call.h"
#include "gated_linear_recurrence/gates.h"

namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence {

// Sequences of a task. Its tiles stay in the second-level cache.
constexpr int64_t kSequences = 24;

// Rows of `padded` channels, one per sequence.
template <class A>
struct Head {
    static constexpr int L = kLanes<A>, kWide = kCols<A>;

    const GatedLinearRecurrence& call;
    int64_t C, D, padded, panels, panel;

    explicit Head(const GatedLinearRecurrence& c)
        : call(c),
          C(c.H * c.D),
          D(c.D),
          padded(round_up(c.D, int64_t(kWide))),
          panels(padded / kWide),
          panel(c.D * kWide) {}

    int64_t sequences() const { return call.B * call.N; }
    int64_t blocks() const { return ceil_div(sequences(), kSequences); }
    // Place of a vector of channels in a tile that is stored in panels.
    static int64_t in_panels(int64_t r, int64_t c) { return (c / kWide * kSequences + r) * kWide + c % kWide; }

    // Frame t of head h of the sequences from `first` on; zeros after the channels. Frames before 0 are those of the state.
    void fetch(const TensorView& from, int64_t h, int64_t first, int64_t rows, int64_t t, A* to) const {
        for (int64_t r = 0; r < rows; ++r, to += padded) {
            const int64_t b = (first + r) / call.N, n = (first + r) % call.N;
            if (t >= 0) {
                const int64_t offset = b * from.stride[0] + t * from.stride[1] + n * from.stride[2] + h * D;
                read_row(call.dtype, from.data, offset, D, to);
            } else if (call.inputs) {
                const int64_t frame = kRecurrenceTaps - 1 + t;
                const int64_t offset = ((b * (kRecurrenceTaps - 1) + frame) * call.N + n) * C + h * D;
                read_row(call.dtype, call.inputs, offset, D, to);
            } else {
                std::fill_n(to, D, A(0));
            }
            std::fill(to + D, to + padded, A(0));
        }
    }

    // To frame t of a contiguous [B, frames, N, C] of x's type.
    void write(const A* from, int64_t h, int64_t first, int64_t rows, int64_t t, int64_t frames, void* to) const {
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t b = (first + r) / call.N, n = (first + r) % call.N;
            write_row(call.dtype, from + r * padded, to, ((b * frames + t) * call.N + n) * C + h * D, D);
        }
    }

    // Rows of a contiguous [B, N, C] of the accumulator's type, or zeros for null.
    void fetch_hidden(const void* from, int64_t h, int64_t first, int64_t rows, A* to) const {
        std::fill_n(to, kSequences * padded, A(0));
        for (int64_t r = 0; from && r < rows; ++r)
            std::copy_n(static_cast<const A*>(from) + (first + r) * C + h * D, D, to + r * padded);
    }
    void write_hidden(const A* from, int64_t h, int64_t first, int64_t rows, void* to) const {
        for (int64_t r = 0; r < rows; ++r)
            std::copy_n(from + r * padded, D, static_cast<A*>(to) + (first + r) * C + h * D);
    }

    // D numbers of head h of a parameter, and zeros up to `padded`.
    void fetch_parameter(const void* from, int64_t offset, A* to) const {
        std::copy_n(static_cast<const A*>(from) + offset, D, to);
        std::fill(to + D, to + padded, A(0));
    }

    // A gate's weights [H, D, D] as panels [H][panels][D][kWide], of the transposes too.
    void lay_out(const void* weight, bool transposed, A* to) const {
        const A* from = static_cast<const A*>(weight);
        std::fill_n(to, call.H * panels * panel, A(0));
        for (int64_t h = 0; h < call.H; ++h)
            for (int64_t i = 0; i < D; ++i)
                for (int64_t j = 0; j < D; ++j) {
                    const int64_t row = transposed ? j : i, column = transposed ? i : j;
                    to[(h * panels + column / kWide) * panel + row * kWide + column % kWide] =
                        from[(h * D + i) * D + j];
                }
    }

    // out (+)= left [rows, D] x weight of head h; the result is in panels.
    void multiply(const A* left, const A* weight, int64_t h, int64_t rows, A* out, bool add) const {
        product<A, false>(rows, D, panels, left, padded, weight + h * panels * panel, panel, out, kSequences * kWide,
                          add);
    }
};

// The parameters of one head that are no matrices.
template <class A>
struct Vectors {
    A *conv[kRecurrenceTaps], *conv_bias, *input_bias, *decay_bias, *rate;

    Vectors(const Head<A>& head, Arena& arena) {
        for (A*& tap : conv) tap = arena.take<A>(head.padded);
        conv_bias = arena.take<A>(head.padded), input_bias = arena.take<A>(head.padded);
        decay_bias = arena.take<A>(head.padded), rate = arena.take<A>(head.padded);
    }

    void fetch(const Head<A>& head, int64_t h) {
        const GatedLinearRecurrence& call = head.call;
        for (int k = 0; k < kRecurrenceTaps; ++k)
            head.fetch_parameter(call.conv_weight, k * head.C + h * head.D, conv[k]);
        head.fetch_parameter(call.conv_bias, h * head.D, conv_bias);
        head.fetch_parameter(call.input_bias, h * head.D, input_bias);
        head.fetch_parameter(call.decay_bias, h * head.D, decay_bias);
        head.fetch_parameter(call.rate, h * head.D, rate);
    }
};

// The four frames that the convolution sees; frame t is in the place t modulo 4.
template <class A>
struct Ring {
    A* data;
    int64_t size;

    Ring(const Head<A>& head, Arena& arena) : size(kSequences * head.padded) {
        data = arena.take<A>(kRecurrenceTaps * size);
    }
    A* operator[](int64_t t) const { return data + (t & (kRecurrenceTaps - 1)) * size; }
};

// u[t] = bias + sum over k of weight[k] x[t - 3 + k]
template <class A>
void convolve(const Head<A>& head, const Vectors<A>& v, const Ring<A>& x, int64_t t, int64_t rows, A* u) {
    const int64_t padded = head.padded;
    for (int64_t c = 0; c < padded; c += kLanes<A>) {
        const Vec<A> bias = load(v.conv_bias + c);
        const A* frame[kRecurrenceTaps];
        Vec<A> weight[kRecurrenceTaps];
        TRITONKERN_UNROLL
        for (int k = 0; k < kRecurrenceTaps; ++k)
            frame[k] = x[t + 1 - kRecurrenceTaps + k] + c, weight[k] = load(v.conv[k] + c);
        for (int64_t at = 0; at < rows * padded; at += padded) {
            Vec<A> sum = bias;
            TRITONKERN_UNROLL
            for (int k = 0; k < kRecurrenceTaps; ++k) sum += weight[k] * load(frame[k] + at);
            store(u + at + c, sum);
        }
    }
}

// The gates of a tile in panels, from what their linear layers give without the bias. A loop of its own: the next one, which needs
// the gates, would otherwise wait for every exponential.
template <class A>
void open_gates(const Head<A>& head, const A* bias, int64_t rows, A* panels) {
    for (int64_t c = 0; c < head.padded; c += kLanes<A>) {
        const Vec<A> shift = load(bias + c);
        A* const gates = panels + head.in_panels(0, c);
        for (int64_t r = 0; r < rows; ++r) store(gates + r * kCols<A>, sigmoid<A>(load(gates + r * kCols<A>) + shift));
    }
}

}  // namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence
