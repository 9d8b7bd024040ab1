// GroupNorm with one group over all frames, pixels and channels of a batch entry: its statistics, and its gradient.
//
// Sums run in vectors over the channels of a pixel, then in float64 over pixels, in their order.
#pragma once

#include "temporal_adapter/pixels.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {

// Tasks of `kStrip` image rows each; none reaches across frames.
struct Strips {
    static constexpr int64_t kStrip = 8;
    AdapterShape shape;
    int64_t a_frame, a_batch, count;

    explicit Strips(const AdapterShape& shape)
        : shape(shape), a_frame(ceil_div(shape.h, kStrip)), a_batch(a_frame * shape.T), count(a_batch * shape.B) {}

    // Calls run(b, t, y, x) for every pixel of a strip.
    template <class Run>
    TRITONKERN_INLINE void each_pixel(int64_t strip, const Run& run) const {
        const int64_t b = strip / a_batch, t = strip / a_frame % shape.T, y = strip % a_frame * kStrip;
        for (int64_t row = y; row < min(y + kStrip, shape.h); ++row)
            for (int64_t x = 0; x < shape.w; ++x) run(b, t, row, x);
    }
};

template <class A>
TRITONKERN_INLINE double horizontal(Vec<A> v) {
    double sum = 0;
    for (int i = 0; i < kLanes<A>; ++i) sum += double(v[i]);
    return sum;
}

// Sum of the channels of a pixel less `shift`, and sum of the squares of what differs from their own mean.
template <class A, class S>
TRITONKERN_INLINE void pixel_moments(const S* p, int64_t C, double shift, double* sum, double* square) {
    constexpr int L = kLanes<A>;
    Vec<A> sums[4] = {};
    const Vec<A> less = broadcast(A(shift));
    const int64_t whole = C / L * L;
    for (int64_t c = 0; c < whole; c += L) sums[c / L % 4] += load_channels<A>(p + c, L) - less;
    double total = horizontal<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t c = whole; c < C; ++c) total += double(widen(p[c])) - double(A(shift));
    const double mean = total / double(C);

    Vec<A> squares[4] = {};
    const Vec<A> centre = broadcast(A(mean));
    for (int64_t c = 0; c < whole; c += L) {
        const Vec<A> d = (load_channels<A>(p + c, L) - less) - centre;
        squares[c / L % 4] += d * d;
    }
    double total_square = horizontal<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (int64_t c = whole; c < C; ++c) {
        const double d = double(widen(p[c])) - double(A(shift)) - double(A(mean));
        total_square += d * d;
    }
    *sum = total;
    // Around the rounded mean; what that adds is C times the square of its error.
    const double rounding = mean - double(A(mean));
    *square = total_square - double(C) * rounding * rounding;
}

template <class A>
void compute_statistics(const GroupNormStatistics& call) {
    const Strips strips(call.shape);
    const Offsets at(call.image, call.shape, 0, 0);
    struct Partial {
        double sum, square, sum_square;
    };
    std::vector<Partial> partial(strips.count);
    std::vector<double> shifts(call.shape.B);
    for_storage<A>(call.image.dtype, [&](auto element) {
        using S = decltype(element);
        // Every value is taken relative to the first pixel's mean, so that a large mean costs no digits.
        for (int64_t b = 0; b < call.shape.B; ++b) {
            double sum, square;
            pixel_moments<A>(frame_data<const S>(call.image, b, 0) + at.rows[0] + at.columns[0], call.C, 0, &sum,
                             &square);
            shifts[b] = double(A(sum / double(call.C)));
        }
        parallel_for(strips.count, 1, call.shape.num_threads, 0, [&](int64_t strip, int64_t, Arena) {
            Partial total{0, 0, 0};
            strips.each_pixel(strip, [&](int64_t b, int64_t t, int64_t y, int64_t x) {
                double sum, square;
                const S* p = frame_data<const S>(call.image, b, t) + at.rows[y] + at.columns[x];
                pixel_moments<A>(p, call.C, shifts[b], &sum, &square);
                total.sum += sum, total.square += square, total.sum_square += sum * sum;
            });
            partial[strip] = total;
        });
    });
    const double pixels = double(call.shape.T) * double(call.shape.h) * double(call.shape.w);
    for (int64_t b = 0; b < call.shape.B; ++b) {
        Partial total{0, 0, 0};
        for (int64_t i = b * strips.a_batch; i < (b + 1) * strips.a_batch; ++i) {
            total.sum += partial[i].sum, total.square += partial[i].square;
            total.sum_square += partial[i].sum_square;
        }
        const double count = pixels * double(call.C), mean = total.sum / count;
        // Within pixels, and between the means of pixels.
        const double between = total.sum_square / double(call.C) - total.sum * mean;
        const double variance = (total.square + (between < 0 ? 0 : between)) / count;
        call.mean[b] = shifts[b] + mean;
        call.rstd[b] = 1 / __builtin_sqrt(variance + call.eps);
    }
}

template <class A>
void compute_sums(const GroupNormBackward& call) {
    constexpr int L = kLanes<A>;
    const Strips strips(call.shape);
    const Offsets at(call.image, call.shape, 0, 0), grad_at(call.grad, call.shape, 0, 0);
    const int64_t C = call.C, width = round_up(C, L);
    std::vector<A> partial(strips.count * 2 * width, A(0));
    for_storage<A>(call.image.dtype, [&](auto element) {
        using S = decltype(element);
        parallel_for(strips.count, 1, call.shape.num_threads, 0, [&](int64_t strip, int64_t, Arena) {
            A* sum = &partial[strip * 2 * width];
            A* moment = sum + width;
            strips.each_pixel(strip, [&](int64_t b, int64_t t, int64_t y, int64_t x) {
                const S* image = frame_data<const S>(call.image, b, t) + at.rows[y] + at.columns[x];
                const A* grad = frame_data<const A>(call.grad, b, t) + grad_at.rows[y] + grad_at.columns[x];
                const Vec<A> mean = broadcast(A(call.mean[b]));
                for (int64_t c = 0; c < C; c += L) {
                    const Vec<A> g = load_channels<A>(grad + c, C - c);
                    store(sum + c, load(sum + c) + g);
                    store(moment + c, load(moment + c) + g * (load_channels<A>(image + c, C - c) - mean));
                }
            });
        });
    });
    std::fill(call.sums, call.sums + call.shape.B * C, 0.0);
    std::fill(call.moments, call.moments + call.shape.B * C, 0.0);
    for (int64_t strip = 0; strip < strips.count; ++strip) {
        const int64_t b = strip / strips.a_batch;
        for (int64_t c = 0; c < C; ++c) {
            call.sums[b * C + c] += double(partial[strip * 2 * width + c]);
            call.moments[b * C + c] += double(partial[(strip * 2 + 1) * width + c]);
        }
    }
}

template <class A>
void compute_gradient(const GroupNormBackward& call) {
    constexpr int L = kLanes<A>;
    const Strips strips(call.shape);
    const Offsets at(call.image, call.shape, 0, 0), grad_at(call.grad, call.shape, 0, 0);
    const Offsets out_at(call.grad_image, call.shape, 0, 0);
    const int64_t C = call.C;
    for_storage<A>(call.image.dtype, [&](auto element) {
        using S = decltype(element);
        parallel_for(strips.count, 1, call.shape.num_threads, 0, [&](int64_t strip, int64_t, Arena) {
            strips.each_pixel(strip, [&](int64_t b, int64_t t, int64_t y, int64_t x) {
                const S* image = frame_data<const S>(call.image, b, t) + at.rows[y] + at.columns[x];
                const A* grad = frame_data<const A>(call.grad, b, t) + grad_at.rows[y] + grad_at.columns[x];
                S* out = frame_data<S>(call.grad_image, b, t) + out_at.rows[y] + out_at.columns[x];
                const A* slope = static_cast<const A*>(call.slope) + b * C;
                const Vec<A> scale = broadcast(static_cast<const A*>(call.scale)[b]);
                const Vec<A> shift = broadcast(static_cast<const A*>(call.shift)[b]);
                for (int64_t c = 0; c < C; c += L) {
                    const Vec<A> g = load_channels<A>(grad + c, C - c) * load_channels<A>(slope + c, C - c);
                    store_channels<A>(out + c, g + (load_channels<A>(image + c, C - c) * scale + shift), C - c);
                }
            });
        });
    });
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
