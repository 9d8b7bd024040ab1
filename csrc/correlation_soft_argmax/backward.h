// Gradients of query and features. With c_i the cost of cell i and p_i its share of the softmax within the disc,
//
//   grad_c_i       = temperature * p_i * (centre_i - point) . grad_point    in the disc
//                    + grad_mean / cells                                     in every cell: one vector for a whole frame
//                    + grad_maximum in the best cell, grad_minimum in the worst one
//   grad_query     = sum over frames and cells of grad_c_i * feature_i
//   grad_feature_i = sum over queries of grad_c_i * query
//
// Costs in the disc are computed twice, once for each of the two sums, instead of stored: a disc may be the whole grid.
#pragma once

#include "correlation_soft_argmax/cells.h"
#include "correlation_soft_argmax/disc.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {

template <class S>
class Backward {
    using A = Accumulator<S>;

    const CorrelationSoftArgmax& call;
    const Disc disc;
    const int64_t cells, padded, strip, strips;
    const int threads;
    // For grad_mean: weighted sums over the queries [B, T, padded], sums over the features [B, T, strips, padded].
    std::vector<A> query_sum, features_sum;

    // Queries per task; a task reads the features frame by frame for all of them.
    static constexpr int64_t kChunk = 16;

    struct Scratch {
        A *query, *rows, *grad;

        Scratch(int64_t padded, int64_t grads, int64_t C, Arena& arena) {
            query = arena.take<A>(padded);
            rows = arena.take<A>(copied<S>(Batch<A>::kSize, C));
            grad = arena.take<A>(grads * padded);
        }
    };

  public:
    explicit Backward(const CorrelationSoftArgmax& c)
        : call(c),
          disc(c.limit, c.height, c.width),
          cells(c.height * c.width),
          padded(round_up(c.C, kLanes<A>)),
          // The gradients of a strip, and its features, stay in a second-level cache of 512 KiB.
          strip(min(cells, max<int64_t>(16, (192 << 10) / (padded * int64_t(sizeof(A)))))),
          strips(ceil_div(cells, strip)),
          threads(c.num_threads) {}

    void run() {
        if (call.grad_mean) {
            query_sum.resize(call.B * call.T * padded);
            features_sum.resize(call.B * call.T * strips * padded);
            sum_queries();
        }
        const Result<S> features(call.grad_features, call.B * call.T * cells * call.C, call.C);
        for_tasks(call.B * call.T * strips, strip, [&](int64_t i, const Scratch& scratch) {
            features_gradient(i / strips / call.T, i / strips % call.T, i % strips, scratch, features);
        });
        if (call.grad_mean) {
            for (int64_t frame = 0; frame < call.B * call.T; ++frame) {
                for (int64_t s = 1; s < strips; ++s)
                    add_scaled(A(1), features_sum.data() + (frame * strips + s) * padded, padded,
                               features_sum.data() + frame * strips * padded);
            }
        }
        const int64_t chunks = ceil_div(call.N, kChunk);
        const Result<S> queries(call.grad_query, call.B * call.N * call.C, call.C);
        for_tasks(call.B * chunks, kChunk, [&](int64_t i, const Scratch& scratch) {
            query_gradient(i / chunks, i % chunks * kChunk, scratch, queries);
        });
    }

  private:
    template <class Body>
    void for_tasks(int64_t tasks, int64_t grads, const Body& body) const {
        Arena count;
        Scratch(padded, grads, call.C, count);
        parallel_for(tasks, 1, threads, count.used,
                     [&](int64_t i, int64_t, Arena arena) { body(i, Scratch(padded, grads, call.C, arena)); });
    }

    A inverse_norm_of_query(int64_t b, int64_t n) const {
        return call.cosine ? static_cast<const A*>(call.query_inverse_norm)[b * call.N + n] : A(1);
    }
    const A* inverse_norms_of_frame(int64_t b, int64_t t) const {
        return call.cosine ? static_cast<const A*>(call.features_inverse_norm) + (b * call.T + t) * cells : nullptr;
    }

    const A* unit_query(int64_t b, int64_t n, A* scratch) const {
        const A* row = Cells<S>::queries(call, b).row(n, scratch);
        if (!call.cosine) return row;
        const A factor = inverse_norm_of_query(b, n);
        for (int64_t d = 0; d < padded; d += kLanes<A>) store(scratch + d, load(row + d) * factor);
        return scratch;
    }

    void sum_queries() {
        for_tasks(call.B * call.T, 0, [&](int64_t frame, const Scratch& scratch) {
            const int64_t b = frame / call.T, t = frame % call.T;
            for (int64_t n = 0; n < call.N; ++n) {
                const A grad = static_cast<const A*>(call.grad_mean)[(b * call.N + n) * call.T + t] / A(cells);
                add_scaled(grad, unit_query(b, n, scratch.query), padded, query_sum.data() + frame * padded);
            }
        });
    }

    // use(cell, gradient of its cost without that of the mean, its row) for the cells among begin..end-1 that are in the
    // disc of query n in frame t or are its best or worst. The feature is row, with `cosine` factor * row.
    // `best` and `worst` may hold any number: cells outside of the grid do not take part.
    template <class Use>
    void for_gradients(int64_t b, int64_t n, int64_t t, int64_t begin, int64_t end, const A* query, A* row_scratch,
                       const Use& use) const {
        const int64_t pair = (b * call.N + n) * call.T + t, best = call.best[pair], worst = call.worst[pair];
        const auto at = [&](const void* x) { return static_cast<const A*>(x)[pair]; };
        const Cells<S> frame = Cells<S>::frame(call, b, t);
        if (call.grad_points) {
            const A* factor = inverse_norms_of_frame(b, t);
            const PointGradient<A> gradient(A(call.temperature), at(call.maximum), at(call.weight),
                                            static_cast<const A*>(call.points) + 2 * pair,
                                            static_cast<const A*>(call.grad_points) + 2 * pair, best, call.width);
            Batch<A> batch;
            const auto flush = [&] {
                const A* rows[Batch<A>::kSize];
                for (int i = 0; i < batch.count; ++i) rows[i] = frame.row(batch.cell[i], row_scratch + i * padded);
                row_products(query, rows, batch.count, padded, batch.score);
                if (factor) {
                    for (int i = 0; i < batch.count; ++i) batch.score[i] *= factor[batch.cell[i]];
                }
                gradient(batch);
                for (int i = 0; i < batch.count; ++i) use(batch.cell[i], batch.value[i], rows[i]);
                batch.count = 0;
            };
            disc.for_cells(best, begin, end, [&](int64_t cell, int64_t dx, int64_t dy) {
                batch.add(cell, dx, dy);
                if (batch.full()) flush();
            });
            if (batch.count) flush();
        }
        if (call.grad_maximum && begin <= best && best < end)
            use(best, at(call.grad_maximum), frame.row(best, row_scratch));
        if (call.grad_minimum && begin <= worst && worst < end)
            use(worst, at(call.grad_minimum), frame.row(worst, row_scratch));
    }

    void features_gradient(int64_t b, int64_t t, int64_t s, const Scratch& scratch, const Result<S>& result) {
        const int64_t begin = s * strip, end = min(begin + strip, cells), frame_index = b * call.T + t;
        const Cells<S> frame = Cells<S>::frame(call, b, t);
        const A* factor = inverse_norms_of_frame(b, t);
        for (int64_t i = 0; i < end - begin; ++i) {
            A* grad = scratch.grad + i * padded;
            if (call.grad_mean) {
                std::memcpy(grad, query_sum.data() + frame_index * padded, padded * sizeof(A));
                add_scaled(factor ? factor[begin + i] : A(1), frame.row(begin + i, scratch.rows), padded,
                           features_sum.data() + (frame_index * strips + s) * padded);
            } else {
                std::memset(grad, 0, padded * sizeof(A));
            }
        }
        for (int64_t n = 0; n < call.N; ++n) {
            const int64_t pair = (b * call.N + n) * call.T + t, worst = call.worst[pair];
            const bool near = disc.reaches(call.best[pair], begin, end);
            if (!near && !(call.grad_minimum && begin <= worst && worst < end)) continue;
            const A* query = unit_query(b, n, scratch.query);
            for_gradients(b, n, t, begin, end, query, scratch.rows, [&](int64_t cell, A grad, const A*) {
                add_scaled(grad, query, padded, scratch.grad + (cell - begin) * padded);
            });
        }
        for (int64_t i = 0; i < end - begin; ++i) {
            A* grad = scratch.grad + i * padded;
            if (factor) {
                const A* row = frame.row(begin + i, scratch.rows);
                normalize_backward(row, factor[begin + i], A(call.eps), padded, grad);
            }
            result.write((frame_index * cells + begin + i) * call.C, call.C, grad);
        }
    }

    void query_gradient(int64_t b, int64_t begin, const Scratch& scratch, const Result<S>& result) const {
        const int64_t end = min(begin + kChunk, call.N);
        std::memset(scratch.grad, 0, (end - begin) * padded * sizeof(A));
        for (int64_t t = 0; t < call.T; ++t) {
            const A* factor = inverse_norms_of_frame(b, t);
            for (int64_t n = begin; n < end; ++n) {
                A* sum = scratch.grad + (n - begin) * padded;
                const A* query = unit_query(b, n, scratch.query);
                for_gradients(b, n, t, 0, cells, query, scratch.rows, [&](int64_t cell, A grad, const A* row) {
                    add_scaled(factor ? grad * factor[cell] : grad, row, padded, sum);
                });
                if (call.grad_mean) {
                    const A grad = static_cast<const A*>(call.grad_mean)[(b * call.N + n) * call.T + t] / A(cells);
                    add_scaled(grad, features_sum.data() + (b * call.T + t) * strips * padded, padded, sum);
                }
            }
        }
        for (int64_t n = begin; n < end; ++n) {
            A* grad = scratch.grad + (n - begin) * padded;
            if (call.cosine) {
                const A* row = Cells<S>::queries(call, b).row(n, scratch.query);
                normalize_backward(row, inverse_norm_of_query(b, n), A(call.eps), padded, grad);
            }
            result.write((b * call.N + n) * call.C, call.C, grad);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
