// The cells that all samples of a point share, and interpolation between values at them.
//
//   o---o---o---o      Samples (x) are a whole number of cells apart, so all of them have the same position between their
//   | x | x | x |      four cells (o): `radius` 1 has 3 x 3 samples and 4 x 4 cells.
//   o---o---o---o      Values at cells are planes of `pitch` lanes, one lane per support.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/strided.h"
#include "local_correlation/call.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

constexpr int64_t kMaxSide = 2 * kMaxLocalRadius + 2;

template <class S>
struct Lattice {
    using A = Accumulator<S>;

    int64_t side, cells;
    A slow, fast;                                         // fractions, of a step to the next row and column
    bool known;                                           // false for a NaN position; then nothing else is valid
    int64_t row_index[kMaxSide], column_index[kMaxSide];  // clamped to the map; -1: no cell

    explicit Lattice(const LocalCorrelation& call) : side(2 * call.radius + 2), cells(side * side) {}

    void place(const LocalCorrelation& call, int64_t b, int64_t t, int64_t n) {
        const int64_t* stride = call.position.stride;
        const A* at = static_cast<const A*>(call.position.data) + b * stride[0] + t * stride[1] + n * stride[2];
        const A first = at[0], second = at[stride[3]];
        const A x = call.x_is_fast ? first : second, y = call.x_is_fast ? second : first;
        known = x == x && y == y;
        if (!known) return;
        fast = axis(x, call.width, call, column_index);
        slow = axis(y, call.height, call, row_index);
    }

  private:
    A axis(A position, int64_t size, const LocalCorrelation& call, int64_t* index) const {
        // Beyond these positions, and at infinity, the samples are the border alone, or zeros.
        position = max(A(-call.radius - 2), min(A(size + call.radius), position));
        const A floor = std::floor(position);
        for (int64_t i = 0; i < side; ++i) {
            const int64_t cell = int64_t(floor) - call.radius + i;
            const int64_t clamped = max<int64_t>(0, min(size - 1, cell));
            index[i] = call.zeros && cell != clamped ? -1 : clamped;
        }
        return position - floor;
    }
};

template <class A>
TRITONKERN_INLINE Vec<A> between(Vec<A> x, Vec<A> y, A fraction) {
    return (1 - fraction) * x + fraction * y;
}

// out[i] = (1 - fraction) rows[i] + fraction next[i] for `count` lanes, whole vectors.
template <class A>
inline void between(const A* rows, const A* next, A fraction, int64_t count, A* out) {
    for (int64_t i = 0; i < count; i += kLanes<A>) store(out + i, between<A>(load(rows + i), load(next + i), fraction));
}

// samples[p * S + s], `count` in all, from the values v at the cells, with row = (1 - slow) v[y] + slow v[y + 1]:
//   samples[y, x] = (1 - fast) row[x] + fast row[x + 1]
template <class A>
inline void interpolate(const A* values, int64_t side, int64_t pitch, int64_t S, A slow, A fast, A* row, A* samples,
                        int64_t count) {
    for (int64_t y = 0; y + 1 < side; ++y) {
        const A* here = values + y * side * pitch;
        between(here, here + side * pitch, slow, side * pitch, row);
        for (int64_t x = 0; x + 1 < side; ++x, samples += S, count -= S) {
            A* sample = row + x * pitch;
            // Whole vectors may overwrite the samples that follow, which are written later, but not what is beyond the last.
            between(sample, sample + pitch, fast, pitch, count >= pitch ? samples : sample);
            if (count < pitch) std::copy(sample, sample + S, samples);
        }
    }
}

// The transpose of `interpolate`: gradients g of the samples (planes of `pitch` lanes) -> gradients of the values at the cells.
//   grad_values[y, x] = (1 - slow) sum[y, x] + slow sum[y - 1, x],   sum[y, x] = (1 - fast) g[y, x] + fast g[y, x - 1]
template <class A>
inline void spread(const A* grad_samples, int64_t side, int64_t pitch, A slow, A fast, A* grad_values) {
    for (int64_t i = 0; i < side * pitch; i += kLanes<A>) store(grad_values + i, Vec<A>{});
    for (int64_t y = 0; y + 1 < side; ++y) {
        const A* sample = grad_samples + y * (side - 1) * pitch;
        A *here = grad_values + y * side * pitch, *next = here + side * pitch;
        for (int64_t x = 0; x < side; ++x) {
            for (int64_t i = x * pitch; i < (x + 1) * pitch; i += kLanes<A>) {
                Vec<A> sum = {};
                if (x + 1 < side) sum += (1 - fast) * load(sample + i);
                if (x > 0) sum += fast * load(sample + i - pitch);
                store(here + i, load(here + i) + (1 - slow) * sum);
                store(next + i, slow * sum);
            }
        }
    }
}

// The gradients of the two fractions: g times the slopes of the bilinear interpolation, summed over samples and supports.
//   grad_fast = sum g[y, x] between(v[y, x + 1] - v[y, x], v[y + 1, x + 1] - v[y + 1, x]),   grad_slow likewise along y
template <class A>
inline void slopes(const A* values, const A* grad_samples, int64_t side, int64_t pitch, A slow, A fast, A* grad_slow,
                   A* grad_fast) {
    Vec<A> along_slow = {}, along_fast = {};
    for (int64_t y = 0; y + 1 < side; ++y) {
        for (int64_t x = 0; x + 1 < side; ++x, grad_samples += pitch) {
            const A* here = values + (y * side + x) * pitch;
            for (int64_t i = 0; i < pitch; i += kLanes<A>) {
                const Vec<A> grad = load(grad_samples + i), v00 = load(here + i), v01 = load(here + pitch + i);
                const Vec<A> v10 = load(here + side * pitch + i), v11 = load(here + (side + 1) * pitch + i);
                along_fast += grad * between<A>(v01 - v00, v11 - v10, slow);
                along_slow += grad * between<A>(v10 - v00, v11 - v01, fast);
            }
        }
    }
    const Vec<A> both[4] = {along_slow, along_fast, {}, {}};
    A sums[4];
    reduce<A>(both, Sum{}, sums);
    *grad_slow = sums[0], *grad_fast = sums[1];
}

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
