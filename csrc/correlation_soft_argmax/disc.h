// The cells near the best one, and the softmax over them.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {

// The cells (x, y) of a grid with (x - centre_x)^2 + (y - centre_y)^2 < limit.
class Disc {
    const int64_t height, width;
    std::vector<int64_t> half;  // half[|dy|]: the largest |dx|; as many entries as there are values of |dy|

  public:
    Disc(int64_t limit, int64_t h, int64_t w) : height(h), width(w) {
        for (int64_t dy = 0; dy < h && dy * dy < limit; ++dy) {
            int64_t dx = min(int64_t(std::sqrt(double(limit - dy * dy))) + 1, w - 1);
            while (dx * dx + dy * dy >= limit) --dx;
            half.push_back(dx);
        }
    }

    // Whether any of the cells begin..end-1 may be in the disc around `centre`.
    bool reaches(int64_t centre, int64_t begin, int64_t end) const {
        const int64_t rows = int64_t(half.size());
        return centre + rows * width > begin && centre - rows * width < end;
    }

    // use(cell, dx, dy) for the cells in the disc around `centre` that are among begin..end-1, in order; dx and dy are their
    // distances to the centre in cells. A centre outside of the grid is allowed.
    template <class Use>
    void for_cells(int64_t centre, int64_t begin, int64_t end, const Use& use) const {
        const int64_t reach = int64_t(half.size()) - 1, row = centre / width, column = centre % width;
        const int64_t last_row = min(min(row + reach, height - 1), (end - 1) / width);
        for (int64_t y = max(max<int64_t>(row - reach, 0), begin / width); y <= last_row; ++y) {
            const int64_t dx = half[y < row ? row - y : y - row], middle = y * width + column;
            const int64_t first = max(middle - min(dx, column), begin);
            const int64_t last = min(middle + min(dx, width - 1 - column), end - 1);
            for (int64_t cell = first; cell <= last; ++cell) use(cell, cell - middle, y - row);
        }
    }
};

// Some cells of a disc; the arithmetic on them is done for all at once.
template <class A>
struct Batch {
    // Two rounds of products, over 16 rows of 384 floats, find them in the first-level cache the second time.
    static constexpr int kSize = 16;

    alignas(kCacheLine) A dx[kSize] = {}, dy[kSize] = {}, score[kSize], value[kSize];
    int64_t cell[kSize];  // number of the cell, or another index of its score
    int count = 0;

    void add(int64_t number, int64_t x, int64_t y) {
        cell[count] = number, dx[count] = A(x), dy[count] = A(y);
        ++count;
    }
    bool full() const { return count == kSize; }

    // use(dx, dy, weight, place of the results in `value`) for whole vectors, with
    //   weight = e^(temperature * (score - maximum)),   0 beyond `count`
    template <class Use>
    TRITONKERN_INLINE void weights(A temperature, A maximum, const Use& use) {
        for (int i = count; i < kSize; ++i) score[i] = -std::numeric_limits<A>::infinity();
        TRITONKERN_UNROLL
        for (int i = 0; i < kSize; i += kLanes<A>) {
            const Vec<A> exponent = temperature * (load(score + i) - maximum);
            // The maximum was found with another order of sums, so that a rounded score may be larger than it.
            use(load(dx + i), load(dy + i), exp<A>(exponent > 0 ? Vec<A>{} : exponent), value + i);
        }
    }
};

// The soft-argmax around a finite maximum. With w_i = e^(temperature * (score_i - maximum)),
//   weight = sum over the disc of w_i,   point = best + 0.5 + sum over the disc of w_i * (dx_i, dy_i) / weight
// Offsets from the best cell lose less in a sum than coordinates. number(cell, dx, dy) is what a batch stores for a cell, and
// fill(batch) computes the scores from these numbers.
template <class A, class Number, class Fill>
inline void locate(const Disc& disc, int64_t cells, int64_t width, int64_t best, A temperature, A maximum,
                   const Number& number, const Fill& fill, A* point, A* weight) {
    Batch<A> batch;
    Vec<A> sums[4] = {};
    const auto flush = [&] {
        fill(batch);
        batch.weights(temperature, maximum,
                      [&](Vec<A> dx, Vec<A> dy, Vec<A> w, A*) { sums[0] += w, sums[1] += w * dx, sums[2] += w * dy; });
        batch.count = 0;
    };
    disc.for_cells(best, 0, cells, [&](int64_t cell, int64_t dx, int64_t dy) {
        batch.add(number(cell, dx, dy), dx, dy);
        if (batch.full()) flush();
    });
    if (batch.count) flush();
    A total[4];
    reduce<A>(sums, Sum{}, total);
    *weight = total[0];
    point[0] = A(best % width) + A(0.5) + total[1] / total[0];
    point[1] = A(best / width) + A(0.5) + total[2] / total[0];
}

template <class A>
inline void no_point(A* point, A* weight) {
    point[0] = point[1] = *weight = std::numeric_limits<A>::quiet_NaN();
}

// The gradient of the scores in the disc from that of the point:
//   grad_score_i = temperature * w_i / weight * (centre_i - point) . grad_point
template <class A>
struct PointGradient {
    A temperature, maximum, factor, grad_x, grad_y, constant;

    PointGradient(A temperature, A maximum, A weight, const A* point, const A* grad, int64_t best, int64_t width)
        : temperature(temperature), maximum(maximum), factor(temperature / weight), grad_x(grad[0]), grad_y(grad[1]) {
        const A x = point[0] - (A(best % width) + A(0.5)), y = point[1] - (A(best / width) + A(0.5));
        constant = x * grad_x + y * grad_y;
    }

    // Scores to gradients, in batch.value.
    void operator()(Batch<A>& batch) const {
        batch.weights(temperature, maximum, [&](Vec<A> dx, Vec<A> dy, Vec<A> w, A* out) {
            store(out, factor * w * (dx * grad_x + dy * grad_y - constant));
        });
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
