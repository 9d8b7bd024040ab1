// Gradients, frame after frame from the last to the first. With g[t] the gradient of h[t], from the result and from h[t + 1]:
//
//   g[t] = grad_out[t] + a[t + 1] g[t + 1]
//   grad_log_a = g a h[t - 1] - 2 a^2 slope g i u,   slope = min(1 / (2 m), 1000); the second term is 0 where m is set to 1
//   grad_rate = sum of grad_log_a r
//   grad_zi = g u m i (1 - i),   grad_zr = grad_log_a rate r (1 - r)                of the gates before their sigmoids
//   grad_u = g i m + grad_zi W_i^T + grad_zr W_r^T
//   grad_W = sum of u^T grad_z,   grad_b = sum of grad_z
//   grad_x[t] = sum over k of conv_weight[k] grad_u[t + 3 - k],   grad_conv_weight[k] = sum of grad_u[t] x[t - 3 + k]
//
// Everything but the hidden states, which are the result, is computed again.
#pragma once

#include "gated_linear_recurrence/gates.h"
#include "gated_linear_recurrence/tiles.h"

namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence {

// Sums of the parameters' gradients, one per head, at most. A constant, so that their order does not depend on the number of
// threads.
constexpr int64_t kPartials = 8;

template <class A>
class Backward {
    static constexpr int L = kLanes<A>;
    // Rows of `padded` numbers in the sums of one task: taps, biases and rate; the matrices follow, in panels.
    static constexpr int kConvBias = kRecurrenceTaps, kInputBias = kConvBias + 1, kDecayBias = kConvBias + 2;
    static constexpr int kRate = kConvBias + 3, kVectors = kConvBias + 4;

    const Head<A> head;
    Buffer<A> weights[2], transposed[2];  // of the gates of the input and of the decay
    int64_t chunk, chunks, sums;          // blocks of a task, tasks of a head, numbers of a task's sums

    struct Scratch {
        Vectors<A> v;
        Ring<A> x, grad_x;
        A *u, *before, *grad, *carry, *grad_u, *row[2], *panel[2], *of_u;

        Scratch(const Head<A>& head, Arena& arena) : v(head, arena), x(head, arena), grad_x(head, arena) {
            const int64_t tile = kSequences * head.padded;
            for (A** p : {&u, &before, &grad, &carry, &grad_u, &row[0], &row[1], &panel[0], &panel[1], &of_u})
                *p = arena.take<A>(tile);
        }
    };

    void block(int64_t h, int64_t first, int64_t rows, const Scratch& s, A* to) const {
        const GatedLinearRecurrence& call = head.call;
        const int64_t tile = kSequences * head.padded;
        head.fetch_hidden(call.grad_new_hidden, h, first, rows, s.carry);
        for (int64_t t = call.T; t > call.T - kRecurrenceTaps; --t) {
            if (t < call.T) head.fetch(call.x, h, first, rows, t, s.x[t]);
            std::fill_n(s.grad_x[t], tile, A(0));
        }
        // Invariant: s.x holds the frames t - 2 to t, s.grad_x what frames after t have added to the gradients of t - 2 to t, and
        // s.carry a[t + 1] g[t + 1].
        for (int64_t t = call.T - 1; t >= 0; --t) {
            const int64_t oldest = t + 1 - kRecurrenceTaps;
            head.fetch(call.x, h, first, rows, oldest, s.x[oldest]);
            head.fetch(call.grad_out, h, first, rows, t, s.grad);
            if (t > 0) head.fetch(call.out, h, first, rows, t - 1, s.before);
            if (t == 0) head.fetch_hidden(call.hidden, h, first, rows, s.before);
            convolve(head, s.v, s.x, t, rows, s.u);
            for (int i = 0; i < 2; ++i) {
                head.multiply(s.u, weights[i].get(), h, rows, s.panel[i], false);
                open_gates(head, i == 0 ? s.v.input_bias : s.v.decay_bias, rows, s.panel[i]);
            }
            through_gates(t == 0 && !call.hidden, rows, s, to);
            for (int i = 0; i < 2; ++i) {
                head.multiply(s.row[i], transposed[i].get(), h, rows, s.of_u, i == 1);
                product<A, true>(head.D, rows, head.panels, s.u, head.padded, s.panel[i], kSequences * head.kWide,
                                 to + kVectors * head.padded + i * head.panels * head.panel, head.panel, true);
            }
            through_convolution(t, rows, s, to);
            if (call.grad_x) head.write(s.grad_x[t], h, first, rows, t, call.T, call.grad_x);
        }
        for (int64_t frame = 0; call.grad_inputs && frame < kRecurrenceTaps - 1; ++frame)
            head.write(s.grad_x[frame + 1 - kRecurrenceTaps], h, first, rows, frame, kRecurrenceTaps - 1,
                       call.grad_inputs);
        if (call.grad_hidden) head.write_hidden(s.carry, h, first, rows, call.grad_hidden);
    }

    // From the gradient of the result to those of both gates before their sigmoids, as rows and in panels. Pointers are copied: a
    // store of a vector may, for all that the compiler knows, change them.
    void through_gates(bool clip_begins, int64_t rows, const Scratch& s, A* to) const {
        const int64_t padded = head.padded;
        for (int64_t c = 0; c < padded; c += L) {
            const Vec<A> rate = load(s.v.rate + c);
            A *const input_panel = s.panel[0] + head.in_panels(0, c), *const decay_panel =
                                                                          s.panel[1] + head.in_panels(0, c);
            A *const input_row = s.row[0] + c, *const decay_row = s.row[1] + c;
            A *const carry = s.carry + c, *const grad_u = s.grad_u + c;
            const A *const us = s.u + c, *const grads = s.grad + c, *const before = s.before + c;
            Vec<A> sums[3] = {};
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = r * padded, p = r * head.kWide;
                const Vec<A> input = load(input_panel + p), decay = load(decay_panel + p);
                const Factors<A> f(decay, rate, clip_begins);
                const Vec<A> u = load(us + at), grad = load(grads + at) + load(carry + at);
                Vec<A> of_log = grad * load(before + at) * f.factor;
                if (!clip_begins) {
                    const Vec<A> four = A(4) * f.rest;
                    const Vec<A> bounded = four < kLeastSquare<A> ? broadcast(kLeastSquare<A>) : four;
                    of_log -= A(2) * f.square / sqrt<A>(bounded) * (grad * u * input);
                }
                const Vec<A> of_input = grad * u * f.multiplier * (input * (A(1) - input));
                const Vec<A> of_decay = of_log * rate * (decay * (A(1) - decay));
                store(input_row + at, of_input), store(input_panel + p, of_input);
                store(decay_row + at, of_decay), store(decay_panel + p, of_decay);
                store(grad_u + at, grad * input * f.multiplier);
                store(carry + at, f.factor * grad);
                sums[0] += of_input, sums[1] += of_decay, sums[2] += of_log * decay;
            }
            const int places[] = {kInputBias, kDecayBias, kRate};
            for (int i = 0; i < 3; ++i) {
                A* const sum = to + places[i] * padded + c;
                store(sum, load(sum) + sums[i]);
            }
        }
    }

    void through_convolution(int64_t t, int64_t rows, const Scratch& s, A* to) const {
        const int64_t padded = head.padded;
        for (int64_t c = 0; c < padded; c += L) {
            const A* x[kRecurrenceTaps];
            A* of_x[kRecurrenceTaps];
            Vec<A> weight[kRecurrenceTaps], sums[kRecurrenceTaps + 1] = {};
            TRITONKERN_UNROLL
            for (int k = 0; k < kRecurrenceTaps; ++k) {
                const int64_t frame = t + 1 - kRecurrenceTaps + k;
                x[k] = s.x[frame] + c, of_x[k] = s.grad_x[frame] + c, weight[k] = load(s.v.conv[k] + c);
            }
            const A *const direct = s.grad_u + c, *const of_gates = s.of_u + head.in_panels(0, c);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = r * padded;
                const Vec<A> grad = load(direct + at) + load(of_gates + r * head.kWide);
                TRITONKERN_UNROLL
                for (int k = 0; k < kRecurrenceTaps; ++k) {
                    // The oldest frame takes the place of one whose gradient is complete.
                    const Vec<A> added = weight[k] * grad;
                    store(of_x[k] + at, k == 0 ? added : load(of_x[k] + at) + added);
                    sums[k] += grad * load(x[k] + at);
                }
                sums[kConvBias] += grad;
            }
            for (int i = 0; i <= kConvBias; ++i) {
                A* const sum = to + i * padded + c;
                store(sum, load(sum) + sums[i]);
            }
        }
    }

    // The sums of all tasks of a head, one after the other in double.
    void add_up(const A* partial) const {
        const GatedLinearRecurrence& call = head.call;
        const auto total = [&](int64_t h, int64_t at) {
            double sum = 0;
            for (int64_t i = 0; i < chunks; ++i) sum += double(partial[(i * call.H + h) * sums + at]);
            return A(sum);
        };
        void* const vectors[] = {call.grad_conv_bias, call.grad_input_bias, call.grad_decay_bias, call.grad_rate};
        void* const matrices[] = {call.grad_input_weight, call.grad_decay_weight};
        for (int64_t h = 0; h < call.H; ++h) {
            for (int64_t c = 0; c < head.D; ++c) {
                for (int k = 0; k < kRecurrenceTaps && call.grad_conv_weight; ++k)
                    static_cast<A*>(call.grad_conv_weight)[k * head.C + h * head.D + c] = total(h, k * head.padded + c);
                for (int i = 0; i < kVectors - kConvBias; ++i)
                    if (vectors[i])
                        static_cast<A*>(vectors[i])[h * head.D + c] = total(h, (kConvBias + i) * head.padded + c);
            }
            for (int i = 0; i < 2; ++i) {
                if (!matrices[i]) continue;
                const int64_t begin = kVectors * head.padded + i * head.panels * head.panel;
                for (int64_t row = 0; row < head.D; ++row)
                    for (int64_t c = 0; c < head.D; ++c)
                        static_cast<A*>(matrices[i])[(h * head.D + row) * head.D + c] =
                            total(h, begin + c / head.kWide * head.panel + row * head.kWide + c % head.kWide);
            }
        }
    }

  public:
    explicit Backward(const GatedLinearRecurrence& call) : head(call) {
        const void* const from[] = {call.input_weight, call.decay_weight};
        for (int i = 0; i < 2; ++i) {
            weights[i] = allocate<A>(call.H * head.panels * head.panel);
            transposed[i] = allocate<A>(call.H * head.panels * head.panel);
            head.lay_out(from[i], false, weights[i].get());
            head.lay_out(from[i], true, transposed[i].get());
        }
        chunk = ceil_div(head.blocks(), kPartials), chunks = ceil_div(head.blocks(), chunk);
        sums = round_up(kVectors * head.padded + 2 * head.panels * head.panel, kCacheLine / int64_t(sizeof(A)));
    }

    void run() const {
        Arena count;
        Scratch(head, count);
        const int64_t heads = head.call.H;
        const Buffer<A> partial = allocate<A>(chunks * heads * sums);
        parallel_for(chunks * heads, 1, head.call.num_threads, count.used,
                     [&](int64_t begin, int64_t end, Arena arena) {
                         Scratch scratch(head, arena);
                         for (int64_t task = begin; task < end; ++task) {
                             const int64_t h = task % heads, from = task / heads * chunk;
                             A* const to = partial.get() + task * sums;
                             std::fill_n(to, sums, A(0));
                             scratch.v.fetch(head, h);
                             for (int64_t b = from; b < min(from + chunk, head.blocks()); ++b) {
                                 const int64_t first = b * kSequences;
                                 block(h, first, min(kSequences, head.sequences() - first), scratch, to);
                             }
                         }
                     });
        add_up(partial.get());
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence
