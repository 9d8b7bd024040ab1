// Matching and cost of a pair of frames. The head-mean C of the pair in work is stored once, in panels of kOwn source cells:
//
//   cost [M / kOwn][S][kOwn]      1. a task per panel:                   sums over heads of softmax over t, complete in the task
//                                 2. a task per kOwn target cells t:     the same of softmax over s, transposed and added
//                                 3. a task per panel:                   arg max and mean position, or the result itself
//
// so that each product is computed once, and C is written and read twice for all heads together.
#pragma once

#include "query_key_matching/block.h"
#include "query_key_matching/call.h"

namespace tritonkern::TRITONKERN_ISA::query_key_matching {

template <class A>
class Forward {
    static constexpr int L = kLanes<A>;

    const QueryKeyMatching& call;
    const int64_t panels, chunks;
    const A share;

    struct Scratch {
        Block<A> block;
        A *tile, *factor, *sums, *square;  // [S, kOwn], [chunks, kOwn], [panels * kOwn, kOwn], [kOwn, kOwn]

        Scratch(const Forward& f, Arena& arena) : block(f.call.D, arena) {
            tile = arena.take<A>(f.call.S * kOwn);
            factor = arena.take<A>(f.chunks * kOwn);
            sums = arena.take<A>(f.call.symmetric ? f.panels * kOwn * kOwn : 0);
            square = arena.take<A>(kOwn * kOwn);
        }
    };

    Head head(const TensorView& x, int64_t b, int64_t t, int64_t h) const {
        const int64_t* stride = x.stride;
        return {call.dtype, x.data, b * stride[0] + t * stride[1] + h * stride[3], stride[2], call.D};
    }
    int64_t cell(int64_t b, int64_t m) const { return call.cells ? call.cells[b * call.M + m] : m; }

    template <class Body>
    void for_tasks(int64_t tasks, const Body& body) const {
        Arena count;
        Scratch(*this, count);
        parallel_for(tasks, 1, call.num_threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Scratch scratch(*this, arena);
            for (int64_t i = first; i < last; ++i) body(i, scratch);
        });
    }

  public:
    explicit Forward(const QueryKeyMatching& c)
        : call(c),
          panels(ceil_div(c.M, kOwn)),
          chunks(ceil_div(c.S, kChunk)),
          share(A(1) / A(c.H * (c.symmetric ? 2 : 1))) {}

    void run() const {
        const Buffer<A> cost = allocate<A>(panels * call.S * kOwn);
        for (int64_t b = 0; b < call.B; ++b)
            for (int64_t t = 0; t < call.T; ++t) {
                if (t == call.source && !call.cost) {
                    for (int64_t m = 0; m < call.M; ++m) itself(b, m);
                    continue;
                }
                for_tasks(panels, [&](int64_t p, Scratch& s) { over_targets(b, t, p, s, cost.get()); });
                if (call.symmetric)
                    for_tasks(ceil_div(call.S, kOwn),
                              [&](int64_t i, Scratch& s) { over_sources(b, t, i * kOwn, s, cost.get()); });
                for_tasks(panels, [&](int64_t p, Scratch& s) {
                    const A* panel = cost.get() + p * call.S * kOwn;
                    if (call.cost) return copy_out(b, t, p, panel, s);
                    locate(b, t, p, panel);
                });
            }
    }

  private:
    // A: sums of the weights of the targets t for kOwn source cells.
    void over_targets(int64_t b, int64_t t, int64_t p, Scratch& s, A* cost) const {
        A* const panel = cost + p * call.S * kOwn;
        std::fill_n(panel, call.S * kOwn, A(0));
        const auto number = [&](int64_t i) { return cell(b, p * kOwn + i); };
        for (int64_t h = 0; h < call.H; ++h) {
            s.block.begin(head(call.query, b, call.source, h), call.scale, min(kOwn, call.M - p * kOwn), number);
            s.block.weigh(head(call.key, b, t, h), call.S, share, s.tile, s.factor, None{});
            add_weights(s.tile, s.factor, call.S, [](int64_t r) { return r; }, panel);
        }
    }

    // B: sums of the weights of the sources s for kOwn target cells, of which those of `cells` are wanted.
    void over_sources(int64_t b, int64_t t, int64_t first, Scratch& s, A* cost) const {
        const int64_t count = min(kOwn, call.S - first);
        std::fill_n(s.sums, panels * kOwn * kOwn, A(0));
        for (int64_t h = 0; h < call.H; ++h) {
            s.block.begin(head(call.query, b, t, h), call.scale, count, [&](int64_t i) { return first + i; });
            s.block.weigh(head(call.key, b, call.source, h), call.S, share, s.tile, s.factor, None{});
            add_weights(s.tile, s.factor, call.M, [&](int64_t m) { return cell(b, m); }, s.sums);
        }
        for (int64_t p = 0; p < panels; ++p) {
            transpose_rows<A>({s.sums + p * kOwn * kOwn, kOwn}, kOwn, kOwn, s.square, kOwn);
            A* const to = cost + (p * call.S + first) * kOwn;
            for (int64_t i = 0; i < count * kOwn; i += L) store(to + i, load(to + i) + load(s.square + i));
        }
    }

    int64_t row(int64_t b, int64_t t, int64_t m) const { return (b * call.T + t) * call.M + m; }

    void result(int64_t at, int64_t index, A peak, A x, A y, A weight) const {
        call.index[at] = index;
        static_cast<A*>(call.peak)[at] = peak, static_cast<A*>(call.weight)[at] = weight;
        static_cast<A*>(call.points)[2 * at] = x, static_cast<A*>(call.points)[2 * at + 1] = y;
    }

    void itself(int64_t b, int64_t m) const {
        const int64_t index = cell(b, m);
        result(row(b, call.source, m), index, 1, index % call.width + A(0.5), index / call.width + A(0.5), 1);
    }

    // The first cell that has the maximum of C, and the C-weighted mean of the cells around it; NaN and -1 if any C is NaN.
    void locate(int64_t b, int64_t t, int64_t p, const A* panel) const {
        for (int64_t lane = 0; lane < kOwn && p * kOwn + lane < call.M; lane += L) {
            Vec<A> peak = broadcast(A(-1));
            IntVec<A> best = {}, broken = {};
            for (int64_t i = 0; i < call.S; ++i) {
                const Vec<A> c = load(panel + i * kOwn + lane);
                const IntVec<A> above = c > peak;
                peak = above ? c : peak;
                best = above ? (best & 0) + typename VecTypes<A>::Integer(i) : best;
                broken |= c != c;
            }
            Vec<A> x = {}, y = {}, weight = peak;
            if (call.limit > 0) {
                weight = Vec<A>{};
                const IntVec<A> best_y = best / typename VecTypes<A>::Integer(call.width);
                const IntVec<A> best_x = best - best_y * typename VecTypes<A>::Integer(call.width);
                const Vec<A> from_x = __builtin_convertvector(best_x, Vec<A>);
                const Vec<A> from_y = __builtin_convertvector(best_y, Vec<A>);
                for (int64_t row = 0, i = 0; row < call.height; ++row)
                    for (int64_t column = 0; column < call.width; ++column, ++i) {
                        const Vec<A> dx = A(column) - from_x, dy = A(row) - from_y;
                        const Vec<A> c = load(panel + i * kOwn + lane);
                        const Vec<A> kept = dx * dx + dy * dy < A(call.limit) ? c : Vec<A>{};
                        weight += kept, x += kept * dx, y += kept * dy;
                    }
            }
            for (int64_t l = 0; l < L && p * kOwn + lane + l < call.M; ++l) {
                const int64_t at = row(b, t, p * kOwn + lane + l), index = best[l];
                const A nan = std::numeric_limits<A>::quiet_NaN();
                if (broken[l]) {
                    result(at, -1, nan, nan, nan, nan);
                } else {
                    result(at, index, peak[l], index % call.width + A(0.5) + x[l] / weight[l],
                           index / call.width + A(0.5) + y[l] / weight[l], weight[l]);
                }
            }
        }
    }

    void copy_out(int64_t b, int64_t t, int64_t p, const A* panel, Scratch& s) const {
        A* const out = static_cast<A*>(call.cost) + row(b, t, p * kOwn) * call.S;
        for (int64_t i = 0; i < call.S; i += kOwn) {
            const int64_t count = min(kOwn, call.S - i);
            transpose_rows<A>({panel + i * kOwn, kOwn}, count, kOwn, s.square, kOwn);
            for (int64_t m = 0; m < min(kOwn, call.M - p * kOwn); ++m)
                std::copy_n(s.square + m * kOwn, count, out + m * call.S + i);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::query_key_matching
