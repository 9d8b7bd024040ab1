// Gradients of temporal window attention. With p recomputed from the scores, and dp_ij = grad_out_i . v_j:
//
//   ds_ij = scale * p_ij * (dp_ij - sum_k p_ik dp_ik)
//   grad_query_i = sum_j ds_ij k_j,   grad_key_j = sum_i ds_ij q_i,   grad_value_j = sum_i p_ij grad_out_i
//
// A task owns a stretch of keys and of queries. It computes every query that sees one of its keys, those of its neighbours
// included, so that nobody adds to another's result.
#pragma once

#include "temporal_window_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA {

template <class S>
class Backward {
    using A = Accumulator<S>;
    using Ahead = Prefetcher<S, 4, 3>;

    const TemporalWindowAttention& call;
    const int64_t left, right;
    const Plan<S> plan;
    const bool streams;  // results bypass the caches

    struct Scratch {
        A *query, *grad_out, *rows, *key_columns, *value_columns, *grad_key, *grad_value, *weights, *grad_scores,
            *total, *out;

        // A stretch of keys needs the queries that see them, and those queries need all the keys that they see.
        Scratch(const Plan<S>& plan, int64_t reach, Arena& arena) {
            query = arena.take<A>((plan.chunk + reach) * plan.padded_dim);
            grad_out = arena.take<A>((plan.chunk + reach) * plan.padded_dim);
            rows = arena.take<A>(plan.key_columns * plan.padded_dim);
            key_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            value_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            grad_key = arena.take<A>(plan.chunk * plan.padded_dim);
            grad_value = arena.take<A>(plan.chunk * plan.padded_dim);
            weights = arena.take<A>(plan.batch * kBlock * plan.weight_stride);
            grad_scores = arena.take<A>(plan.batch * kBlock * plan.weight_stride);
            total = arena.take<A>(plan.batch * kBlock);
            out = arena.take<A>(kBlock * plan.padded_dim);
        }
    };

  public:
    // Queries next to a stretch are computed by both of its neighbours: a stretch is much longer than what it sees.
    explicit Backward(const TemporalWindowAttention& c)
        : call(c),
          left(min(c.left, c.T - 1)),
          right(min(c.right, c.T - 1)),
          plan(c, left, right, /*longest=*/max<int64_t>(128, 4 * (left + right)), /*halo=*/2 * (left + right)),
          streams(worth_streaming<S>(call.grad_query, call) && worth_streaming<S>(call.grad_key, call) &&
                  worth_streaming<S>(call.grad_value, call)) {}

    void run() const {
        const typename Ahead::Targets targets = {
            {&call.query, left},   {&call.key, left + right}, {&call.value, left + right}, {&call.grad_out, left},
            {&call.grad_query, 0}, {&call.grad_key, 0},       {&call.grad_value, 0}};
        Arena count;
        Scratch(plan, left + right, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, left + right, arena);
            for (int64_t i = first; i < last; ++i) {
                const Task task(call, plan, i);
                Ahead ahead(call, Task(call, plan, min(i + 1, last - 1)), targets);
                for (int64_t s = 0; s < task.sequences; ++s) sequence(task, task.first_sequence + s, ahead, scratch);
            }
        });
    }

  private:
    void sequence(const Task& task, int64_t index, Ahead& ahead, const Scratch& scratch) const {
        const int64_t n = index / call.H, h = index % call.H;
        const auto view = [&](const TensorView& tensor) { return Sequence<S>(tensor, call.D, task.b, n, h); };
        const int64_t first_query = max<int64_t>(task.begin - right, 0), last_query = min(task.end + left, call.T);
        const int64_t first_key = max<int64_t>(first_query - left, 0), last_key = min(last_query + right, call.T);

        const Rows<A> values = view(call.value).rows(first_key, last_key, scratch.rows);
        transpose_rows(values, last_key - first_key, call.D, scratch.value_columns, plan.key_columns);
        const Rows<A> keys = view(call.key).rows(first_key, last_key, scratch.rows);
        transpose_rows(keys, last_key - first_key, call.D, scratch.key_columns, plan.key_columns);
        const Rows<A> queries = view(call.query).rows(first_query, last_query, scratch.query);
        const Rows<A> grad_outs = view(call.grad_out).rows(first_query, last_query, scratch.grad_out);

        const int64_t owned = (task.end - task.begin) * plan.padded_dim;
        std::memset(scratch.grad_key, 0, owned * sizeof(A));
        std::memset(scratch.grad_value, 0, owned * sizeof(A));
        // Blocks go in batches, step by step: a step of one block has nothing to wait for from the others.
        const int64_t frames = last_query - first_query, blocks = ceil_div(frames, kBlock);
        for (int64_t first = 0; first < blocks; first += plan.batch) {
            const int64_t last = min(first + plan.batch, blocks);
            const auto rows_of = [&](int64_t block) { return min<int64_t>(kBlock, frames - block * kBlock); };
            const auto band_of = [&](int64_t block) {
                return Band(first_query + block * kBlock, rows_of(block), call.T, left, right, first_key);
            };
            const auto weights_of = [&](int64_t block) {
                return scratch.weights + (block - first) * kBlock * plan.weight_stride;
            };
            const auto grad_scores_of = [&](int64_t block) {
                return scratch.grad_scores + (block - first) * kBlock * plan.weight_stride;
            };
            for (int64_t block = first; block < last; ++block) {
                ahead.fetch_rows(kBlock, streams ? 0 : 3);
                const A* query[kBlock];
                block_rows(queries, block * kBlock, rows_of(block), query);
                A maximum[kBlock];
                scores(plan, band_of(block), query, scratch.key_columns, A(call.scale), weights_of(block), maximum);
                exponentiate(plan, band_of(block).keys, maximum, weights_of(block),
                             scratch.total + (block - first) * kBlock);
            }
            for (int64_t block = first; block < last; ++block) {
                const A* grad_out[kBlock];
                block_rows(grad_outs, block * kBlock, rows_of(block), grad_out);
                const Band band = band_of(block);
                band_dots(band, grad_out, scratch.value_columns + band.first, plan.key_columns, call.D,
                          [&](int64_t key, auto& tile) {
                              constexpr int vectors = sizeof(tile[0]) / sizeof(tile[0][0]);
                              TRITONKERN_UNROLL
                              for (int r = 0; r < kBlock; ++r) {
                                  TRITONKERN_UNROLL
                                  for (int v = 0; v < vectors; ++v)
                                      store(grad_scores_of(block) + r * plan.weight_stride + key + v * kLanes<A>,
                                            tile[r][v]);
                              }
                          });
            }
            for (int64_t block = first; block < last; ++block)
                softmax_gradient(band_of(block), scratch.total + (block - first) * kBlock, weights_of(block),
                                 grad_scores_of(block));
            for (int64_t block = first; block < last; ++block)
                write_grad_query(band_of(block), first_query + block * kBlock, rows_of(block), task, keys,
                                 view(call.grad_query), grad_scores_of(block), scratch.out);
            for (int64_t block = first; block < last; ++block) {
                const A *query[kBlock], *grad_out[kBlock];
                block_rows(queries, block * kBlock, rows_of(block), query);
                block_rows(grad_outs, block * kBlock, rows_of(block), grad_out);
                // The accumulators hold the keys task.begin..task.end-1 only.
                const Band band = band_of(block);
                const int64_t shift = task.begin - first_key;
                const int64_t begin = max<int64_t>(shift - band.first, 0);
                const int64_t end = min(task.end - first_key - band.first, band.keys);
                band_scatter(band, begin, end, grad_scores_of(block), plan.weight_stride, query,
                             scratch.grad_key - shift * plan.padded_dim, plan.padded_dim, plan.padded_dim);
                band_scatter(band, begin, end, weights_of(block), plan.weight_stride, grad_out,
                             scratch.grad_value - shift * plan.padded_dim, plan.padded_dim, plan.padded_dim);
            }
        }
        for (int64_t t = task.begin; t < task.end; ++t) {
            view(call.grad_key).write(t, scratch.grad_key + (t - task.begin) * plan.padded_dim, streams);
            view(call.grad_value).write(t, scratch.grad_value + (t - task.begin) * plan.padded_dim, streams);
        }
    }

    // From grad_scores = dp to scale * p * (dp - sum of p dp). The weights come from the scores anew and are normalised here:
    // lse was rounded, and a sum of p a little off 1 would not cancel against dp.
    void softmax_gradient(const Band& band, const A* total, A* weights, A* grad_scores) const {
        constexpr int L = kLanes<A>;
        const A scale = A(call.scale);
        Vec<A> dot[kBlock] = {};
        for (int64_t key = 0; key < band.keys; key += L) {
            TRITONKERN_UNROLL
            for (int r = 0; r < kBlock; ++r) {
                const int64_t at = r * plan.weight_stride + key;
                const Vec<A> weight = load(weights + at) / total[r];
                store(weights + at, weight);
                dot[r] += band.mask<A>(r, key) ? weight * load(grad_scores + at) : Vec<A>{};
            }
        }
        A mean[kBlock];
        reduce<A>(dot, Sum{}, mean);
        for (int64_t key = 0; key < band.keys; key += L) {
            TRITONKERN_UNROLL
            for (int r = 0; r < kBlock; ++r) {
                const int64_t at = r * plan.weight_stride + key;
                store(grad_scores + at, load(weights + at) * (load(grad_scores + at) - mean[r]) * scale);
            }
        }
    }

    void write_grad_query(const Band& band, int64_t start, int64_t rows, const Task& task, Rows<A> keys,
                          const Sequence<S>& grad_query, const A* grad_scores, A* out) const {
        const int64_t begin = max(start, task.begin), end = min(start + rows, task.end);
        if (begin >= end) return;
        const bool direct = grad_query.usable_in_place() && !streams;
        A factor[kBlock];
        A* target[kBlock];
        for (int r = 0; r < kBlock; ++r) {
            factor[r] = 1;
            target[r] = direct && begin <= start + r && start + r < end
                            ? reinterpret_cast<A*>(grad_query.data + (start + r) * grad_query.time_stride)
                            : out + r * plan.padded_dim;
        }
        band_gather(band, grad_scores, plan.weight_stride, keys, factor, target, plan.padded_dim);
        if (!direct) {
            for (int64_t t = begin; t < end; ++t) grad_query.write(t, target[t - start], streams);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA
