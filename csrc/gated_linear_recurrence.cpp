// The recurrence over time of TAPNext in one pass over memory. For every sequence, in channel c of head h:
//
//   u[t] = conv_bias + sum over k of conv_weight[k] x[t - 3 + k]
//   i[t] = sigmoid(u[t] W_i + b_i),   r[t] = sigmoid(u[t] W_r + b_r)         products over the channels of the head
//   a[t] = exp(rate r[t]),   m[t] = sqrt(1 - a[t]^2), or 1 in the first frame of a clip without a state
//   h[t] = a[t] h[t - 1] + m[t] i[t] u[t]
//
// A task owns one head of some sequences and goes along their frames; a frame is a tile of [sequences, channels]:
//
//   x[t - 3 .. t] --convolution--> u --product--> u W_i, u W_r --gates--> h[t] --> out
//
// Nothing is stored per frame but the result.
#include "gated_linear_recurrence/backward.h"
#include "gated_linear_recurrence/gates.h"
#include "gated_linear_recurrence/tiles.h"

namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence {
namespace {

template <class A>
class Forward {
    static constexpr int L = kLanes<A>;

    const Head<A> head;
    Buffer<A> input_weight, decay_weight;

    struct Scratch {
        Vectors<A> v;
        Ring<A> x;
        A *u, *hidden, *input, *decay;  // the last two in panels

        Scratch(const Head<A>& head, Arena& arena) : v(head, arena), x(head, arena) {
            const int64_t tile = kSequences * head.padded;
            u = arena.take<A>(tile), hidden = arena.take<A>(tile);
            input = arena.take<A>(tile), decay = arena.take<A>(tile);
        }
    };

    void block(int64_t h, int64_t first, int64_t rows, const Scratch& s) const {
        const GatedLinearRecurrence& call = head.call;
        head.fetch_hidden(call.hidden, h, first, rows, s.hidden);
        for (int64_t t = 1 - kRecurrenceTaps; t < 0; ++t) head.fetch(call.x, h, first, rows, t, s.x[t]);
        // Invariant: s.x holds the frames t - 3 to t - 1, s.hidden h[t - 1].
        for (int64_t t = 0; t < call.T; ++t) {
            head.fetch(call.x, h, first, rows, t, s.x[t]);
            convolve(head, s.v, s.x, t, rows, s.u);
            head.multiply(s.u, input_weight.get(), h, rows, s.input, false);
            head.multiply(s.u, decay_weight.get(), h, rows, s.decay, false);
            open_gates(head, s.v.input_bias, rows, s.input);
            open_gates(head, s.v.decay_bias, rows, s.decay);
            advance(t == 0 && !call.hidden, rows, s);
            head.write(s.hidden, h, first, rows, t, call.T, call.out.data);
        }
        head.write_hidden(s.hidden, h, first, rows, call.new_hidden);
    }

    // s.hidden from h[t - 1] to h[t]. Pointers are copied: a store of a vector may, for all that the compiler knows, change them.
    void advance(bool clip_begins, int64_t rows, const Scratch& s) const {
        const int64_t padded = head.padded;
        for (int64_t c = 0; c < padded; c += L) {
            const A *const u = s.u + c, *const input = s.input + head.in_panels(0, c);
            const A* const decay = s.decay + head.in_panels(0, c);
            A* const hidden = s.hidden + c;
            const Vec<A> rate = load(s.v.rate + c);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = r * padded, p = r * head.kWide;
                const Factors<A> f(load(decay + p), rate, clip_begins);
                store(hidden + at, f.factor * load(hidden + at) + load(u + at) * load(input + p) * f.multiplier);
            }
        }
    }

  public:
    explicit Forward(const GatedLinearRecurrence& call) : head(call) {
        const int64_t numbers = call.H * head.panels * head.panel;
        input_weight = allocate<A>(numbers), decay_weight = allocate<A>(numbers);
        head.lay_out(call.input_weight, false, input_weight.get());
        head.lay_out(call.decay_weight, false, decay_weight.get());
    }

    void run() const {
        Arena count;
        Scratch(head, count);
        const int64_t heads = head.call.H;
        parallel_for(heads * head.blocks(), 1, head.call.num_threads, count.used,
                     [&](int64_t begin, int64_t end, Arena arena) {
                         Scratch scratch(head, arena);
                         for (int64_t task = begin; task < end; ++task) {
                             const int64_t h = task % heads, first = task / heads * kSequences;
                             scratch.v.fetch(head, h);
                             block(h, first, min(kSequences, head.sequences() - first), scratch);
                         }
                     });
    }
};

}  // namespace

void forward(const GatedLinearRecurrence& call) {
    if (call.dtype == DType::kFloat64) return Forward<double>(call).run();
    Forward<float>(call).run();
}

void backward(const GatedLinearRecurrence& call) {
    if (call.dtype == DType::kFloat64) return Backward<double>(call).run();
    Backward<float>(call).run();
}

}  // namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence
