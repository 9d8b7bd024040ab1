// Feature vectors as rows that vector code can use, products of rows, and the writing of results.
#pragma once

#include <cmath>

#include "common/strided.h"
#include "correlation_soft_argmax/call.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {

// out[0..padded) = in[0..channels), then zeros.
template <class S, class A = Accumulator<S>>
inline void widen_row(const S* in, int64_t channels, int64_t padded, A* out) {
    int64_t d = 0;
    for (; d + 8 <= channels; d += 8) widen8(in + d, out + d);
    for (; d < channels; ++d) out[d] = widen(in[d]);
    for (; d < padded; ++d) out[d] = 0;
}

// The feature vectors of one frame, or the queries of one batch entry (a grid of one row).
template <class S>
struct Cells {
    using A = Accumulator<S>;

    const S* data;
    int64_t row_stride, column_stride, columns, channels, padded;

    static Cells queries(const CorrelationSoftArgmax& call, int64_t b) {
        const TensorView& x = call.query;
        return {static_cast<const S*>(x.data) + b * x.stride[0],
                0,
                x.stride[1],
                call.N,
                call.C,
                round_up(call.C, kLanes<A>)};
    }
    static Cells frame(const CorrelationSoftArgmax& call, int64_t b, int64_t t) {
        const TensorView& x = call.features;
        return {static_cast<const S*>(x.data) + b * x.stride[0] + t * x.stride[1],
                x.stride[2],
                x.stride[3],
                call.width,
                call.C,
                round_up(call.C, kLanes<A>)};
    }

    static bool usable_in_place(int64_t channels) { return std::is_same_v<S, A> && channels % kLanes<A> == 0; }

    const S* at(int64_t cell) const {
        const uint32_t y = uint32_t(cell) / uint32_t(columns), x = uint32_t(cell) % uint32_t(columns);
        return data + y * row_stride + x * column_stride;
    }

    // `padded` channels of one cell: in place, or widened into `scratch`.
    const A* row(int64_t cell, A* scratch) const {
        const S* in = at(cell);
        if constexpr (std::is_same_v<S, A>) {
            if (channels == padded) return in;
        }
        widen_row(in, channels, padded, scratch);
        return scratch;
    }
};

// Brings cells into the second-level cache, some lines at a time, in the order of their numbers.
template <class S>
class Prefetch {
    const Cells<S>& cells;
    int64_t cell, end, position = 0;

    static constexpr int64_t kPerLine = kCacheLine / int64_t(sizeof(S));

  public:
    Prefetch(const Cells<S>& c, int64_t begin, int64_t end) : cells(c), cell(begin), end(end) {}

    int64_t lines() const { return (end - cell) * ceil_div(cells.channels, kPerLine); }

    void fetch(int64_t count) {
        while (count > 0 && cell < end) {
            const S* row = cells.at(cell);
            for (; count > 0 && position < cells.channels; --count, position += kPerLine)
                __builtin_prefetch(row + position, 0, 2);
            if (position >= cells.channels) position = 0, ++cell;
        }
    }
};

// Scratch that `row` needs for `count` cells.
template <class S>
inline int64_t copied(int64_t count, int64_t channels) {
    return Cells<S>::usable_in_place(channels) ? 0 : count * round_up(channels, kLanes<Accumulator<S>>);
}

// out[i] = x(i) . y[i] over `dim` channels (whole vectors). The bits of out[i] do not depend on i.
template <class A, class X>
TRITONKERN_INLINE void dots(const X& x, const A* const (&y)[4], int64_t dim, A* out) {
    constexpr int L = kLanes<A>;
    // A fused multiply-add takes four cycles and two start in each: eight sums.
    Vec<A> sum[2][4] = {};
    int64_t d = 0;
    for (; d + 2 * L <= dim; d += 2 * L) {
        TRITONKERN_UNROLL
        for (int half = 0; half < 2; ++half) {
            TRITONKERN_UNROLL
            for (int i = 0; i < 4; ++i) sum[half][i] += load(x(i) + d + half * L) * load(y[i] + d + half * L);
        }
    }
    if (d < dim) {
        TRITONKERN_UNROLL
        for (int i = 0; i < 4; ++i) sum[0][i] += load(x(i) + d) * load(y[i] + d);
    }
    TRITONKERN_UNROLL
    for (int i = 0; i < 4; ++i) sum[0][i] += sum[1][i];
    reduce<A>(sum[0], Sum{}, out);
}

// scores[i] = x . rows[i] for i < count; both arrays are read and written up to the next multiple of four.
template <class A>
inline void row_products(const A* x, const A** rows, int64_t count, int64_t dim, A* scores) {
    for (int64_t i = count; i % 4; ++i) rows[i] = rows[count - 1];
    for (int64_t i = 0; i < count; i += 4) {
        const A* const four[4] = {rows[i], rows[i + 1], rows[i + 2], rows[i + 3]};
        dots<A>([&](int) { return x; }, four, dim, scores + i);
    }
}

template <class A>
inline void sums_of_squares(const A** rows, int64_t count, int64_t dim, A* squares) {
    for (int64_t i = count; i % 4; ++i) rows[i] = rows[count - 1];
    for (int64_t i = 0; i < count; i += 4) {
        const A* const four[4] = {rows[i], rows[i + 1], rows[i + 2], rows[i + 3]};
        dots<A>([&](int k) { return four[k]; }, four, dim, squares + i);
    }
}

// NaN stays NaN.
template <class A>
inline A inverse_norm(A square, A eps) {
    return 1 / std::sqrt(square < eps ? eps : square);
}

// out += factor * x
template <class A>
inline void add_scaled(A factor, const A* x, int64_t dim, A* out) {
    for (int64_t d = 0; d < dim; d += kLanes<A>) store(out + d, load(out + d) + factor * load(x + d));
}

// The gradient of x, from the gradient g of u = x * factor, factor = 1 / sqrt(max(x . x, eps)), which is in `grad`:
//   grad_x = (g - u (u . g)) * factor,   and g * factor for vectors shorter than sqrt(eps), whose factor is constant
template <class A>
inline void normalize_backward(const A* x, A factor, A eps, int64_t dim, A* grad) {
    const A *rows[4] = {x, x, x, x}, *const first[4] = {x, grad, x, x};
    A sums[4];
    dots<A>([&](int i) { return rows[i]; }, first, dim, sums);
    const A along = sums[0] < eps ? A(0) : sums[1] * factor;
    for (int64_t d = 0; d < dim; d += kLanes<A>) {
        const Vec<A> unit = load(x + d) * factor;
        store(grad + d, (load(grad + d) - unit * along) * factor);
    }
}

// A result that is written in runs of `run` numbers, each once.
template <class S>
class Result {
    using A = Accumulator<S>;

    S* const data;
    // Results larger than the caches are written past them, in whole lines: an ordinary write of a line that is not in
    // a cache reads it first.
    const bool streams;

    static constexpr int64_t kPerLine = kCacheLine / int64_t(sizeof(S));

  public:
    Result(void* out, int64_t size, int64_t run)
        : data(static_cast<S*>(out)),
          streams(run % kPerLine == 0 && reinterpret_cast<uintptr_t>(out) % kCacheLine == 0 &&
                  size * int64_t(sizeof(S)) >= 32 << 20) {}

    // `position` is a multiple of the run, `count` too; `from` is aligned to a cache line.
    void write(int64_t position, int64_t count, const A* from) const {
        S* out = data + position;
        int64_t d = 0;
        if (streams) {
            for (; d < count; d += kPerLine) {
                if constexpr (std::is_same_v<S, A>) {
                    stream_line(from + d, out + d);
                } else {
                    alignas(kCacheLine) S line[kPerLine];
                    for (int64_t i = 0; i < kPerLine; i += 8) narrow8(from + d + i, line + i);
                    stream_line(line, out + d);
                }
            }
        }
        for (; d + 8 <= count; d += 8) narrow8(from + d, out + d);
        for (; d < count; ++d) narrow(from[d], out + d);
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
