// TAPIR's mixing over time in one pass over memory. For every track, with channels in the lanes of vectors:
//
//   h = LayerNorm(x),   v = gelu(conv1(h)),   out = x + sum over j of conv2(v)[j]
//
// Both convolutions see three frames, t - before to t - before + 2 (before: 1, or 2 where it is causal), and the first makes
// four channels, j, of each channel. v and whatever the convolutions are sums of live in registers: the loop over frames takes
// one frame of h in and hands one frame of the result out.
#include <cmath>
#include <memory>

#include "common/parallel.h"
#include "common/rows.h"
#include "temporal_mixer/call.h"

namespace tritonkern::TRITONKERN_ISA {
namespace {

constexpr int kMultiplier = 4, kTaps = 3;

// The parameters of a vector of channels, in the order in which the loops use them.
template <class A>
struct Weights {
    static constexpr int L = kLanes<A>;
    A norm[L], conv1[kMultiplier][kTaps][L], bias1[kMultiplier][L], conv2[kMultiplier][kTaps][L], bias2[L];
};

// gelu(u) = u * value with value = sigmoid(z) and z = 2 sqrt(2 / pi) (u + 0.044715 u^3): the form with tanh without its
// cancellation. `rest` is 1 - value, as exact where it is small.
template <class A>
struct Gate {
    static constexpr A kTwice = A(1.5957691216057307117597842L), kCubic = A(0.044715L) * kTwice;
    Vec<A> value, rest;

    TRITONKERN_INLINE Gate(Vec<A> u, Vec<A> square) {
        constexpr A largest = sizeof(A) == 4 ? A(87) : A(708);
        const Vec<A> minus_z = u * (square * -kCubic - kTwice);
        const Vec<A> power = exp<A>(minus_z > largest ? broadcast(largest) : minus_z);
        value = A(1) / (A(1) + power), rest = power * value;
    }
};

// Frames [first, last) of one track, and the rows that they need.
struct Stretch {
    int64_t b, n, first, last;

    Stretch(const TemporalMixer& call, int64_t task) {
        const int64_t track = task / call.stretches(), length = call.stretch();
        b = track / call.N, n = track % call.N;
        first = task % call.stretches() * length;
        last = min(first + length, call.T);
    }
};

// Frames lo.. of one track as rows of A, zero from C to whole vectors.
template <class A>
struct Frames {
    A* data;
    int64_t lo = 0, pitch;

    A* row(int64_t t) const { return data + (t - lo) * pitch; }
};

template <class A>
class Mixer {
    static constexpr int L = kLanes<A>;
    static constexpr int kSums = 2 * kMultiplier * kTaps + kMultiplier + 2;
    static constexpr int kBias1 = kMultiplier * kTaps, kConv2 = kBias1 + kMultiplier, kBias2 = 2 * kBias1 + kMultiplier;
    static constexpr int kNorm = kBias2 + 1;

    const TemporalMixer& call;
    const int64_t C, padded, T, before;
    std::unique_ptr<Weights<A>[]> weights;

    struct Scratch {
        Frames<A> x, grad, grad_normed;
        A *mean, *scale;  // of the rows of x
        A *norm, *partial;

        Scratch(const Mixer& mixer, Arena& arena, bool backward) {
            const int64_t rows = mixer.call.stretch() + 4, pitch = mixer.padded;
            x = {arena.take<A>(rows * pitch), 0, pitch};
            mean = arena.take<A>(rows), scale = arena.take<A>(rows);
            if (!backward) return;
            grad = {arena.take<A>(rows * pitch), 0, pitch};
            grad_normed = {arena.take<A>(rows * pitch), 0, pitch};
            norm = arena.take<A>(pitch), partial = arena.take<A>(kSums * pitch);
            if (!norm) return;
            for (int64_t c = 0; c < pitch; c += L) store(norm + c, load(mixer.weights[c / L].norm));
        }
    };

    static const A* as(const void* p) { return static_cast<const A*>(p); }
    static A* as(void* p) { return static_cast<A*>(p); }

    // The rows lo..hi-1 that exist.
    void fetch(const FrameView& from, const Stretch& at, int64_t lo, int64_t hi, Frames<A>& to) const {
        to.lo = max<int64_t>(lo, 0);
        for (int64_t t = to.lo; t < min(hi, T); ++t) {
            const int64_t offset = at.b * from.stride[0] + at.n * from.stride[1] + t * from.stride[2];
            read_row(call.dtype, from.data, offset, C, to.row(t));
            std::fill(to.row(t) + C, to.row(t) + padded, A(0));
        }
    }

    void fetch_normed(const Stretch& at, int64_t lo, int64_t hi, Scratch& s) const {
        fetch(call.x, at, lo, hi, s.x);
        for (int64_t t = s.x.lo; t < min(hi, T); ++t) {
            A* const row = s.x.row(t);
            const A mean = row_sum<A>(padded, [&](int64_t c) { return load(row + c); }) / A(C);
            std::fill(row + C, row + padded, mean);
            const A variance = row_sum<A>(padded, [&](int64_t c) {
                const Vec<A> centred = load(row + c) - mean;
                return centred * centred;
            });
            s.mean[t - s.x.lo] = mean, s.scale[t - s.x.lo] = 1 / std::sqrt(variance / A(C) + A(call.eps));
        }
    }

    // Frame t of the normalised rows without the weight; zeros where there is no frame.
    TRITONKERN_INLINE Vec<A> standard(const Scratch& s, int64_t t, int64_t c) const {
        if (t < s.x.lo || t >= T) return Vec<A>{};
        return (load(s.x.row(t) + c) - s.mean[t - s.x.lo]) * s.scale[t - s.x.lo];
    }
    TRITONKERN_INLINE Vec<A> normed(const Scratch& s, int64_t t, int64_t c, const Weights<A>& w) const {
        return standard(s, t, c) * load(w.norm);
    }

    static TRITONKERN_INLINE Vec<A> inner(const Weights<A>& w, int j, const Vec<A> (&h)[kTaps]) {
        Vec<A> u = load(w.bias1[j]);
        TRITONKERN_UNROLL
        for (int k = 0; k < kTaps; ++k) u += load(w.conv1[j][k]) * h[k];
        return u;
    }

    // What one frame of v adds to the three frames of the result that see it.
    static TRITONKERN_INLINE void spread(const Weights<A>& w, const Vec<A> (&v)[kMultiplier], Vec<A> (&to)[kTaps]) {
        TRITONKERN_UNROLL
        for (int k = 0; k < kTaps; ++k) {
            to[k] = load(w.conv2[0][k]) * v[0];
            TRITONKERN_UNROLL
            for (int j = 1; j < kMultiplier; ++j) to[k] += load(w.conv2[j][k]) * v[j];
        }
    }

    // `count` interleaved groups of four as four vectors, and back.
    static void load_hidden(const A* from, int64_t count, Vec<A> (&v)[kMultiplier]) {
        A lanes[kMultiplier][L] = {};
        for (int64_t i = 0; i < count; ++i)
            for (int j = 0; j < kMultiplier; ++j) lanes[j][i] = from[i * kMultiplier + j];
        for (int j = 0; j < kMultiplier; ++j) v[j] = load(lanes[j]);
    }
    static void store_hidden(const Vec<A> (&v)[kMultiplier], int64_t count, A* to) {
        A lanes[kMultiplier][L];
        for (int j = 0; j < kMultiplier; ++j) store(lanes[j], v[j]);
        for (int64_t i = 0; i < count; ++i)
            for (int j = 0; j < kMultiplier; ++j) to[i * kMultiplier + j] = lanes[j][i];
    }

    void forward(const Stretch& at, Scratch& s) const {
        fetch_normed(at, at.first - 2 * before, at.last + 4 - 2 * before, s);
        for (int64_t c = 0; c < C; c += L) forward(at, c, s);
        for (int64_t t = at.first; t < at.last; ++t)
            write_row(call.dtype, s.x.row(t), call.out, (((at.b * call.N) + at.n) * T + t) * C, C);
    }

    // The result of frame t takes the place of x's in its row.
    TRITONKERN_INLINE void forward(const Stretch& at, int64_t c, const Scratch& s) const {
        const Weights<A>& w = weights[c / L];
        const int64_t track = at.b * call.N + at.n, count = min<int64_t>(L, C - c);
        Vec<A> h[kTaps] = {}, v[kMultiplier], add[kTaps];
        // Of the results of the next two frames, what frames before have added.
        Vec<A> sum[kTaps - 1] = {};
        if (call.normed_state && at.first == 0) {
            for (int i = 0; i < 2; ++i) {
                A lanes[L] = {};
                std::copy_n(as(call.normed_state) + (track * 2 + i) * C + c, count, lanes);
                h[i] = load(lanes);
                load_hidden(as(call.hidden_state) + ((track * 2 + i) * C + c) * kMultiplier, count, v);
                spread(w, v, add);
                sum[0] = sum[1] + add[1], sum[1] = add[0];
            }
        }
        const int64_t begin = max<int64_t>(at.first - before, 0), end = min(at.last + 2 - before, T);
        for (int64_t arriving = s.x.lo; arriving < at.last + 4 - 2 * before; ++arriving) {
            h[2] = normed(s, arriving, c, w);
            const int64_t frame = arriving - 2 + before, done = frame - 2 + before;
            Vec<A> result = sum[0];
            if (begin <= frame && frame < end) {
                TRITONKERN_UNROLL
                for (int j = 0; j < kMultiplier; ++j) {
                    const Vec<A> u = inner(w, j, h);
                    v[j] = u * Gate<A>(u, u * u).value;
                }
                spread(w, v, add);
                result += add[2], sum[0] = sum[1] + add[1], sum[1] = add[0];
                if (call.new_hidden_state && frame >= T - 2) {
                    A* const to = as(call.new_hidden_state) + ((track * 2 + frame - (T - 2)) * C + c) * kMultiplier;
                    store_hidden(v, count, to);
                }
            } else {
                sum[0] = sum[1], sum[1] = Vec<A>{};
            }
            h[0] = h[1], h[1] = h[2];
            if (done < at.first) continue;
            A* const row = s.x.row(done) + c;
            store(row, load(row) + (result + load(w.bias2)));
        }
        if (!call.new_normed_state || at.last < T) return;
        for (int i = 0; i < 2; ++i) {
            A lanes[L];
            store(lanes, h[i]);
            std::copy_n(lanes, count, as(call.new_normed_state) + (track * 2 + i) * C + c);
        }
        if (T == 1) {
            const int64_t old = ((track * 2 + 1) * C + c) * kMultiplier, now = (track * 2 * C + c) * kMultiplier;
            std::copy_n(as(call.hidden_state) + old, count * kMultiplier, as(call.new_hidden_state) + now);
        }
    }

    void backward(const Stretch& at, Scratch& s) const {
        fetch_normed(at, at.first - 2, at.last + 2, s);
        fetch(call.grad_out, at, at.first - 4 + 2 * before, at.last + 2 * before, s.grad);
        s.grad_normed.lo = at.first;
        for (int64_t c = 0; c < C; c += L) backward(at, c, s);
        for (int64_t t = at.first; t < at.last; ++t) through_norm(at, t, s);
    }

    // Gradient of the normalised rows, and the frames' part of the convolutions' gradients.
    //   of v:  frame s was tap k of frame s - k + before;   of h: likewise
    TRITONKERN_INLINE void backward(const Stretch& at, int64_t c, const Scratch& s) const {
        const Weights<A>& w = weights[c / L];
        const auto arriving = [&](int64_t t) __attribute__((always_inline)) {
            return t < s.grad.lo || t >= T ? Vec<A>{} : load(s.grad.row(t) + c);
        };
        const auto finish = [&](int64_t t, Vec<A> grad) __attribute__((always_inline)) {
            if (at.first <= t && t < at.last) store(s.grad_normed.row(t) + c, grad);
        };
        const int64_t begin = max<int64_t>(at.first - 2 + before, 0), end = min(at.last + before, T);
        Vec<A> h[kTaps] = {normed(s, begin - before, c, w), normed(s, begin - before + 1, c, w)};
        // g[k] is the gradient of frame - k + before
        Vec<A> g[kTaps] = {Vec<A>{}, arriving(begin - 1 + before), arriving(begin - 2 + before)};
        Vec<A> sum[kTaps - 1] = {}, sums[kNorm] = {};
        for (int64_t frame = begin; frame < end; ++frame) {
            h[2] = normed(s, frame - before + 2, c, w);
            g[0] = arriving(frame + before);
            const bool own = call.partial && at.first <= frame && frame < at.last;
            Vec<A> add[kTaps] = {};
            TRITONKERN_UNROLL
            for (int j = 0; j < kMultiplier; ++j) {
                const Vec<A> u = inner(w, j, h), square = u * u;
                const Gate<A> gate(u, square);
                const Vec<A> v = u * gate.value;
                const Vec<A> slope = gate.value + v * gate.rest * (square * (3 * gate.kCubic) + gate.kTwice);
                Vec<A> grad = load(w.conv2[j][0]) * g[0];
                TRITONKERN_UNROLL
                for (int k = 1; k < kTaps; ++k) grad += load(w.conv2[j][k]) * g[k];
                grad *= slope;
                TRITONKERN_UNROLL
                for (int k = 0; k < kTaps; ++k) add[k] += load(w.conv1[j][k]) * grad;
                if (!own) continue;
                TRITONKERN_UNROLL
                for (int k = 0; k < kTaps; ++k) {
                    sums[j * kTaps + k] += grad * h[k];
                    sums[kConv2 + j * kTaps + k] += v * g[k];
                }
                sums[kBias1 + j] += grad;
            }
            if (own) sums[kBias2] += before == 1 ? g[1] : g[2];
            finish(frame - before, sum[0] + add[0]);
            sum[0] = sum[1] + add[1], sum[1] = add[2];
            h[0] = h[1], h[1] = h[2], g[2] = g[1], g[1] = g[0];
        }
        finish(end - before, sum[0]), finish(end - before + 1, sum[1]);
        if (!call.partial) return;
        for (int i = 0; i < kNorm; ++i) {
            A* const to = s.partial + i * padded + c;
            store(to, load(to) + sums[i]);
        }
    }

    //   grad_x = grad_out + scale * (g - mean(g) - n * mean(g * n)),   g = grad_h * weight,   n = the normalised row
    void through_norm(const Stretch& at, int64_t t, const Scratch& s) const {
        A *const grad_normed = s.grad_normed.row(t), *const grad = s.grad.row(t);
        const auto weighted = [&](int64_t c) { return load(grad_normed + c) * load(s.norm + c); };
        if (call.partial) {
            for (int64_t c = 0; c < padded; c += L) {
                A* const to = s.partial + kNorm * padded + c;
                store(to, load(to) + load(grad_normed + c) * standard(s, t, c));
            }
        }
        if (!call.grad_x) return;
        const A mean = row_sum<A>(padded, weighted) / A(C);
        const A slope = row_sum<A>(padded, [&](int64_t c) { return weighted(c) * standard(s, t, c); }) / A(C);
        const A scale = s.scale[t - s.x.lo];
        for (int64_t c = 0; c < padded; c += L)
            store(grad + c, load(grad + c) + scale * (weighted(c) - mean - standard(s, t, c) * slope));
        write_row(call.dtype, grad, call.grad_x, (((at.b * call.N) + at.n) * T + t) * C, C);
    }

  public:
    explicit Mixer(const TemporalMixer& c)
        : call(c),
          C(c.C),
          padded(round_up(c.C, L)),
          T(c.T),
          before(c.causal ? 2 : 1),
          weights(new Weights<A>[padded / L]()) {
        for (int64_t channel = 0; channel < C; ++channel) {
            Weights<A>& w = weights[channel / L];
            const int64_t lane = channel % L;
            w.norm[lane] = as(c.norm_weight)[channel];
            for (int j = 0; j < kMultiplier; ++j) {
                const int64_t from = channel * kMultiplier + j;
                for (int k = 0; k < kTaps; ++k) {
                    w.conv1[j][k][lane] = as(c.conv1_weight)[from * kTaps + k];
                    w.conv2[j][k][lane] = as(c.conv2_weight)[from * kTaps + k];
                }
                w.bias1[j][lane] = as(c.conv1_bias)[from];
                if (c.conv2_bias) w.bias2[lane] += as(c.conv2_bias)[from];
            }
        }
    }

    void forward() const {
        Arena count;
        Scratch(*this, count, false);
        const int64_t grain = max<int64_t>(1, 16 / min(call.stretch(), T));
        parallel_for(call.tasks(), grain, call.num_threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Scratch scratch(*this, arena, false);
            for (int64_t task = first; task < last; ++task) forward(Stretch(call, task), scratch);
        });
    }

    void backward() const {
        Arena count;
        Scratch(*this, count, true);
        parallel_for(ceil_div(call.tasks(), call.chunk), 1, call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         Scratch scratch(*this, arena, true);
                         for (int64_t chunk = first; chunk < last; ++chunk) {
                             std::fill(scratch.partial, scratch.partial + kSums * padded, A(0));
                             const int64_t end = min(call.tasks(), (chunk + 1) * call.chunk);
                             for (int64_t task = chunk * call.chunk; task < end; ++task)
                                 backward(Stretch(call, task), scratch);
                             if (!call.partial) continue;
                             A* out = as(call.partial) + chunk * kSums * C;
                             for (int i = 0; i < kSums; ++i) std::copy_n(scratch.partial + i * padded, C, out + i * C);
                         }
                     });
    }
};

}  // namespace

void temporal_mixer_forward(const TemporalMixer& call) {
    if (call.dtype == DType::kFloat64) return Mixer<double>(call).forward();
    Mixer<float>(call).forward();
}

void temporal_mixer_backward(const TemporalMixer& call) {
    if (call.dtype == DType::kFloat64) return Mixer<double>(call).backward();
    Mixer<float>(call).backward();
}

}  // namespace tritonkern::TRITONKERN_ISA
