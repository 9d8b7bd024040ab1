// The soft-argmax of a given cost volume, and its gradient. Both are as fast as memory: one reads, the other writes, each
// cost once.
#pragma once

#include "correlation_soft_argmax/cells.h"
#include "correlation_soft_argmax/disc.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {

template <class S>
class CostVolume {
    using A = Accumulator<S>;

    // Costs whose maximum is found at once; the piece that has the largest is looked through again for its place.
    static constexpr int64_t kPiece = 512;

    const SoftArgmax2d& call;
    const Disc disc;
    const int64_t frames, cells, row_stride, column_stride;
    int threads;

    const S* frame(int64_t index) const {
        const auto& stride = call.cost.stride;
        const int64_t k = index % call.frames[2], j = index / call.frames[2] % call.frames[1];
        const int64_t i = index / call.frames[2] / call.frames[1];
        return static_cast<const S*>(call.cost.data) + i * stride[0] + j * stride[1] + k * stride[2];
    }
    // Cells of a batch carry their offsets from the best one.
    auto reader(const S* frame, int64_t best) const {
        const S* at = frame + best / call.width * row_stride + best % call.width * column_stride;
        return [at](Batch<A>& batch) {
            for (int i = 0; i < batch.count; ++i) batch.score[i] = widen(at[batch.cell[i]]);
        };
    }
    auto offset() const {
        const int64_t row = row_stride, column = column_stride;
        return [row, column](int64_t, int64_t dx, int64_t dy) { return dy * row + dx * column; };
    }

  public:
    explicit CostVolume(const SoftArgmax2d& c)
        : call(c),
          disc(c.limit, c.height, c.width),
          frames(c.frames[0] * c.frames[1] * c.frames[2]),
          cells(c.height * c.width),
          row_stride(c.cost.stride[3]),
          column_stride(c.cost.stride[4]) {
        threads = int(max<int64_t>(1, min<int64_t>(c.num_threads, (frames * cells) >> 15)));
    }

    void forward() const {
        for_frames(0, [&](int64_t i, A*) {
            const S* costs = frame(i);
            A maximum;
            const int64_t best = find_maximum(costs, &maximum);
            static_cast<A*>(call.maximum)[i] = maximum, call.best[i] = int32_t(best);
            A *point = static_cast<A*>(call.points) + 2 * i, *weight = static_cast<A*>(call.weight) + i;
            if (std::isfinite(maximum)) {
                locate(disc, cells, call.width, best, A(call.temperature), maximum, offset(), reader(costs, best),
                       point, weight);
            } else {
                no_point(point, weight);
            }
        });
    }

    void backward() const {
        // A strip of lines of zeros, into which the gradients are written; it goes out past the caches.
        const int64_t strip = 1024;
        const Result<S> result(call.grad_cost, frames * cells, cells);
        for_frames(strip, [&](int64_t i, A* zeros) {
            const S* costs = frame(i);
            const int64_t best = call.best[i];
            const auto read = reader(costs, best);
            const auto number = offset();
            const PointGradient<A> gradient(A(call.temperature), static_cast<const A*>(call.maximum)[i],
                                            static_cast<const A*>(call.weight)[i],
                                            static_cast<const A*>(call.points) + 2 * i,
                                            static_cast<const A*>(call.grad_points) + 2 * i, best, call.width);
            for (int64_t begin = 0; begin < cells; begin += strip) {
                const int64_t end = min(begin + strip, cells);
                std::memset(zeros, 0, strip * sizeof(A));
                if (disc.reaches(best, begin, end)) {
                    Batch<A> batch;
                    int64_t place[Batch<A>::kSize];
                    const auto flush = [&] {
                        read(batch);
                        gradient(batch);
                        for (int k = 0; k < batch.count; ++k) zeros[place[k]] = batch.value[k];
                        batch.count = 0;
                    };
                    disc.for_cells(best, begin, end, [&](int64_t cell, int64_t dx, int64_t dy) {
                        place[batch.count] = cell - begin;
                        batch.add(number(cell, dx, dy), dx, dy);
                        if (batch.full()) flush();
                    });
                    if (batch.count) flush();
                }
                result.write(i * cells + begin, end - begin, zeros);
            }
        });
    }

  private:
    template <class Body>
    void for_frames(int64_t scratch, const Body& body) const {
        // Tasks of at least some thousand costs.
        const int64_t grain =
            max<int64_t>(1, min(ceil_div(frames, int64_t(threads) * 16), ceil_div(int64_t(1) << 20, cells)));
        parallel_for(frames, grain, threads, scratch * int64_t(sizeof(A)),
                     [&](int64_t first, int64_t last, Arena arena) {
                         A* own = arena.take<A>(scratch);
                         for (int64_t i = first; i < last; ++i) body(i, own);
                     });
    }

    // The first cell that has the maximum, or the first NaN.
    int64_t find_maximum(const S* costs, A* result) const {
        const bool one_row = row_stride == call.width * column_stride;
        const int64_t rows = one_row ? 1 : call.height, columns = one_row ? cells : call.width;
        A maximum = -std::numeric_limits<A>::infinity();
        int64_t row = 0, column = 0;  // where the piece with the maximum begins
        for (int64_t y = 0; y < rows && maximum == maximum; ++y) {
            for (int64_t x = 0; x < columns && maximum == maximum; x += kPiece) {
                const int64_t count = min(kPiece, columns - x);
                A copy[kPiece];
                const A* piece = copy;
                const S* in = costs + y * row_stride + x * column_stride;
                if (column_stride == 1) {
                    if constexpr (std::is_same_v<S, A>) {
                        piece = in;
                    } else {
                        widen_row(in, count, count, copy);
                    }
                } else {
                    for (int64_t i = 0; i < count; ++i) copy[i] = widen(in[i * column_stride]);
                }
                if (exceeds(piece, count, maximum)) row = y, column = x;
            }
        }
        const bool broken = maximum != maximum;
        for (const S* in = costs + row * row_stride;; ++column) {
            const A x = widen(in[column * column_stride]);
            if (broken ? x != x : x == maximum) break;
        }
        *result = maximum;
        return row * columns + column;
    }

    // Whether any of `count` costs is above `maximum`, which then becomes the largest of them, or is NaN.
    static bool exceeds(const A* x, int64_t count, A& maximum) {
        constexpr int L = kLanes<A>;
        Vec<A> top[4];
        IntVec<A> broken = {};
        for (auto& t : top) t = broadcast(maximum);
        int64_t i = 0;
        for (; i + 4 * L <= count; i += 4 * L) {
            TRITONKERN_UNROLL
            for (int k = 0; k < 4; ++k) {
                const Vec<A> v = load(x + i + k * L);
                top[k] = v > top[k] ? v : top[k];
                broken |= v != v;
            }
        }
        A lanes[4];
        reduce<A>(top, Maximum{}, lanes);
        A highest = max(max(lanes[0], lanes[1]), max(lanes[2], lanes[3]));
        bool any = false;
        for (; i < count; ++i) {
            highest = x[i] > highest ? x[i] : highest;
            any |= x[i] != x[i];
        }
        for (int l = 0; l < L; ++l) any |= broken[l] != 0;
        const bool found = highest > maximum || any;
        maximum = any ? std::numeric_limits<A>::quiet_NaN() : highest;
        return found;
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
