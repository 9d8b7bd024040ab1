// TAPIR's mixing over time in one pass over memory. For every track, with channels in the lanes of vectors:
//
//   h = LayerNorm(x),   v = gelu(conv1(h)),   out = x + sum over j of conv2(v)[j]
//
// Both convolutions see three frames, t - before to t - before + 2 (before: 1, or 2 where it is causal), and the first makes four
// channels, j, of each channel. v and the partial sums of the convolutions stay in registers: the loop over frames takes in one
// frame of h and completes one frame of the result. With before = 1, when frame t + 2 of h arrives:
//
//   frame         t         t + 1           t + 2
//   h             h[0]      h[1]            h[2]: arriving
//   v                       made of h[0..2]
//   result        result: complete; sum[0] for t + 1, sum[1] for t + 2: what the frames of v so far have added
#include <cmath>
#include <memory>

#include "temporal_mixer/channels.h"
#include "temporal_mixer/frames.h"

namespace tritonkern::TRITONKERN_ISA::temporal_mixer {
namespace {

// Consecutive tasks whose part of the parameters' gradients is summed first. A constant, so that the order of the sums does not
// depend on the number of threads.
constexpr int64_t kTasksPerSum = 16;

template <class A>
class Mixer {
    static constexpr int L = kLanes<A>;
    // Rows of the parameters' gradients (see kMixerSums); the weights of the first convolution are from 0 on.
    static constexpr int kBias1 = kMultiplier * kTaps, kConv2 = kBias1 + kMultiplier, kBias2 = 2 * kBias1 + kMultiplier;
    static constexpr int kNorm = kBias2 + 1;
    static_assert(kNorm + 1 == kMixerSums);

    const TemporalMixer& call;
    const int64_t C, padded, T, before;
    std::unique_ptr<Weights<A>[]> weights;

    struct Scratch {
        Frames<A> x, grad, grad_normed;
        A *mean, *rstd;  // of the rows of x
        A *norm, *sums;

        Scratch(const Mixer& mixer, Arena& arena, bool backward) {
            const int64_t rows = stretch_length(mixer.call) + 4, pitch = mixer.padded;
            x = {arena.take<A>(rows * pitch), 0, pitch};
            mean = arena.take<A>(rows), rstd = arena.take<A>(rows);
            if (!backward) return;
            grad = {arena.take<A>(rows * pitch), 0, pitch};
            grad_normed = {arena.take<A>(rows * pitch), 0, pitch};
            norm = arena.take<A>(pitch), sums = arena.take<A>(kMixerSums * pitch);
            if (!norm) return;
            for (int64_t c = 0; c < pitch; c += L) store(norm + c, load(mixer.weights[c / L].norm));
        }
    };

    static const A* as(const void* p) { return static_cast<const A*>(p); }
    static A* as(void* p) { return static_cast<A*>(p); }

    // The frames of x from lo to hi - 1 that exist, and their statistics: mean and rstd = 1 / sqrt(variance + eps).
    void fetch_normed(const Stretch& at, int64_t lo, int64_t hi, Scratch& s) const {
        s.x.fetch(call, call.x, at, lo, hi);
        for (int64_t t = s.x.lo; t < min(hi, T); ++t) {
            A* const row = s.x.row(t);
            const A mean = row_sum<A>(padded, [&](int64_t c) { return load(row + c); }) / A(C);
            std::fill(row + C, row + padded, mean);
            const A variance = row_sum<A>(padded, [&](int64_t c) {
                const Vec<A> centred = load(row + c) - mean;
                return centred * centred;
            });
            s.mean[t - s.x.lo] = mean, s.rstd[t - s.x.lo] = 1 / std::sqrt(variance / A(C) + A(call.eps));
        }
    }

    // Frame t of the normalised rows without the weight; zeros where there is no frame.
    TRITONKERN_INLINE Vec<A> standard(const Scratch& s, int64_t t, int64_t c) const {
        if (t < s.x.lo || t >= T) return Vec<A>{};
        return (load(s.x.row(t) + c) - s.mean[t - s.x.lo]) * s.rstd[t - s.x.lo];
    }
    TRITONKERN_INLINE Vec<A> normed(const Scratch& s, int64_t t, int64_t c, const Weights<A>& w) const {
        return standard(s, t, c) * load(w.norm);
    }

    void forward_stretch(const Stretch& at, Scratch& s) const {
        fetch_normed(at, at.first - 2 * before, at.last + 4 - 2 * before, s);
        for (int64_t c = 0; c < C; c += L) forward_channels(at, c, s);
        for (int64_t t = at.first; t < at.last; ++t)
            write_row(call.dtype, s.x.row(t), call.out, (((at.b * call.N) + at.n) * T + t) * C, C);
    }

    // The result of frame t overwrites its row of x.
    TRITONKERN_INLINE void forward_channels(const Stretch& at, int64_t c, const Scratch& s) const {
        const Weights<A>& w = weights[c / L];
        const int64_t track = at.b * call.N + at.n, count = min<int64_t>(L, C - c);
        Vec<A> h[kTaps] = {}, v[kMultiplier], add[kTaps], sum[kTaps - 1] = {};
        if (call.normed_state && at.first == 0) {
            for (int i = 0; i < 2; ++i) {
                A lanes[L] = {};
                std::copy_n(as(call.normed_state) + (track * 2 + i) * C + c, count, lanes);
                h[i] = load(lanes);
                load_hidden<A>(as(call.hidden_state) + ((track * 2 + i) * C + c) * kMultiplier, count, v);
                spread<A>(w, v, add);
                sum[0] = sum[1] + add[1], sum[1] = add[0];
            }
        }
        // Invariant: h[0] and h[1] are the two frames before `arriving`; sum[0] and sum[1] belong to the next two frames `done`.
        const int64_t begin = max<int64_t>(at.first - before, 0), end = min(at.last + 2 - before, T);
        for (int64_t arriving = s.x.lo; arriving < at.last + 4 - 2 * before; ++arriving) {
            h[2] = normed(s, arriving, c, w);
            const int64_t frame = arriving - 2 + before, done = frame - 2 + before;
            Vec<A> result = sum[0];
            if (begin <= frame && frame < end) {
                TRITONKERN_UNROLL
                for (int j = 0; j < kMultiplier; ++j) {
                    const Vec<A> u = inner<A>(w, j, h);
                    v[j] = u * Gate<A>(u, u * u).value;
                }
                spread<A>(w, v, add);
                result += add[2], sum[0] = sum[1] + add[1], sum[1] = add[0];
                if (call.new_hidden_state && frame >= T - 2) {
                    A* const to = as(call.new_hidden_state) + ((track * 2 + frame - (T - 2)) * C + c) * kMultiplier;
                    store_hidden<A>(v, count, to);
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

    void backward_stretch(const Stretch& at, Scratch& s) const {
        fetch_normed(at, at.first - 2, at.last + 2, s);
        s.grad.fetch(call, call.grad_out, at, at.first - 4 + 2 * before, at.last + 2 * before);
        s.grad_normed.lo = at.first;
        for (int64_t c = 0; c < C; c += L) backward_channels(at, c, s);
        for (int64_t t = at.first; t < at.last; ++t) through_norm(at, t, s);
    }

    // Gradients of h, and the stretch's part of the convolutions' gradients. As frame s was tap k of frame s - k + before:
    //   grad_v[s, j] = sum over k of conv2[j, k] g[s - k + before],   grad_u = grad_v gelu'(u)
    //   grad_h[s]    = sum over j, k of conv1[j, k] grad_u[s - k + before, j]
    TRITONKERN_INLINE void backward_channels(const Stretch& at, int64_t c, const Scratch& s) const {
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
        // Invariant: h[k] is frame - before + k; sum[0] and sum[1] are what the frames so far have added to grad_h of the next two.
        Vec<A> sum[kTaps - 1] = {}, sums[kNorm] = {};
        for (int64_t frame = begin; frame < end; ++frame) {
            h[2] = normed(s, frame - before + 2, c, w);
            g[0] = arriving(frame + before);
            const bool own = call.sums && at.first <= frame && frame < at.last;
            Vec<A> add[kTaps] = {};
            TRITONKERN_UNROLL
            for (int j = 0; j < kMultiplier; ++j) {
                const Vec<A> u = inner<A>(w, j, h), square = u * u;
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
        if (!call.sums) return;
        for (int i = 0; i < kNorm; ++i) {
            A* const to = s.sums + i * padded + c;
            store(to, load(to) + sums[i]);
        }
    }

    //   grad_x = grad_out + rstd (g - mean(g) - n mean(g n)),   g = grad_h norm_weight,   n = (x - mean(x)) rstd
    void through_norm(const Stretch& at, int64_t t, const Scratch& s) const {
        A *const grad_normed = s.grad_normed.row(t), *const grad = s.grad.row(t);
        const auto weighted = [&](int64_t c) { return load(grad_normed + c) * load(s.norm + c); };
        if (call.sums) {
            for (int64_t c = 0; c < padded; c += L) {
                A* const to = s.sums + kNorm * padded + c;
                store(to, load(to) + load(grad_normed + c) * standard(s, t, c));
            }
        }
        if (!call.grad_x) return;
        const A mean = row_sum<A>(padded, weighted) / A(C);
        const A slope = row_sum<A>(padded, [&](int64_t c) { return weighted(c) * standard(s, t, c); }) / A(C);
        const A rstd = s.rstd[t - s.x.lo];
        for (int64_t c = 0; c < padded; c += L)
            store(grad + c, load(grad + c) + rstd * (weighted(c) - mean - standard(s, t, c) * slope));
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
        for (int64_t channel = 0; channel < C; ++channel) load_weights<A>(c, channel, weights[channel / L]);
    }

    void forward() const {
        Arena count;
        Scratch(*this, count, false);
        const int64_t grain = max<int64_t>(1, 16 / min(stretch_length(call), T));
        parallel_for(tasks(call), grain, call.num_threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Scratch scratch(*this, arena, false);
            for (int64_t task = first; task < last; ++task) forward_stretch(Stretch(call, task), scratch);
        });
    }

    void backward() const {
        Arena count;
        Scratch(*this, count, true);
        const int64_t chunks = ceil_div(tasks(call), kTasksPerSum);
        const Buffer<A> partial = allocate<A>(call.sums ? chunks * kMixerSums * C : 0);
        parallel_for(chunks, 1, call.num_threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Scratch scratch(*this, arena, true);
            for (int64_t chunk = first; chunk < last; ++chunk) {
                std::fill(scratch.sums, scratch.sums + kMixerSums * padded, A(0));
                const int64_t end = min(tasks(call), (chunk + 1) * kTasksPerSum);
                for (int64_t task = chunk * kTasksPerSum; task < end; ++task)
                    backward_stretch(Stretch(call, task), scratch);
                if (!call.sums) continue;
                A* out = partial.get() + chunk * kMixerSums * C;
                for (int i = 0; i < kMixerSums; ++i) std::copy_n(scratch.sums + i * padded, C, out + i * C);
            }
        });
        if (call.sums) add_chunks(partial.get(), chunks);
    }

  private:
    // The sums of all chunks, one after the other in double.
    void add_chunks(const A* partial, int64_t chunks) const {
        constexpr int64_t grain = 4096;
        parallel_for(kMixerSums * C, grain, call.num_threads, grain * sizeof(double),
                     [&](int64_t first, int64_t last, Arena arena) {
                         double* const total = arena.take<double>(grain);
                         std::fill(total, total + grain, 0.0);
                         for (int64_t chunk = 0; chunk < chunks; ++chunk)
                             for (int64_t i = first; i < last; ++i)
                                 total[i - first] += double(partial[chunk * kMixerSums * C + i]);
                         for (int64_t i = first; i < last; ++i) as(call.sums)[i] = A(total[i - first]);
                     });
    }
};

}  // namespace

void forward(const TemporalMixer& call) {
    if (call.dtype == DType::kFloat64) return Mixer<double>(call).forward();
    Mixer<float>(call).forward();
}

void backward(const TemporalMixer& call) {
    if (call.dtype == DType::kFloat64) return Mixer<double>(call).backward();
    Mixer<float>(call).backward();
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_mixer
