// Gradients of temporal window attention. With p recomputed from the scores, and dp_ij = grad_out_i . v_j:
//
//   ds_ij = scale * p_ij * (dp_ij - sum_k p_ik dp_ik)
//   grad_query_i = sum_j ds_ij k_j,   grad_key_j = sum_i ds_ij q_i,   grad_value_j = sum_i p_ij grad_out_i
//
// A task owns a stretch of keys and of queries. It computes every query that sees one of its keys, those of its neighbours
// included, so that nobody adds to another's result.
#pragma once

#include "temporal_window_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA::temporal_window_attention {

template <class S>
class Backward {
    using A = Accumulator<S>;

    const TemporalWindowAttention& call;
    const int64_t left, right;
    const Plan<S> plan;
    const bool streams;  // results bypass the caches

    struct Scratch {
        A *query, *grad_out, *rows, *query_columns, *key_columns, *value_columns, *weights, *grad_scores, *out;
        Exists<A>* exists;

        // A stretch of keys needs the queries that see them, and those queries need all the keys that they see.
        Scratch(const Plan<S>& plan, Arena& arena) {
            query = arena.take<A>(plan.pitch * plan.padded_dim);
            grad_out = arena.take<A>(plan.pitch * plan.padded_dim);
            rows = arena.take<A>(plan.key_columns * plan.padded_dim);
            query_columns = arena.take<A>(kLanes<A> * plan.padded_dim);
            key_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            value_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            weights = arena.take<A>(plan.window * plan.pitch);
            grad_scores = arena.take<A>(plan.window * plan.pitch);
            out = arena.take<A>(kBlock * plan.padded_dim);
            exists = arena.take<Exists<A>>(plan.key_columns);
        }
    };

  public:
    // Queries next to a stretch are computed by both of its neighbours: a stretch is much longer than what it sees.
    explicit Backward(const TemporalWindowAttention& c)
        : call(c),
          left(min(c.left, c.T - 1)),
          right(min(c.right, c.T - 1)),
          plan(c, left, right, /*longest=*/max<int64_t>(128, 4 * (left + right)), /*queries_around=*/left + right),
          streams(worth_streaming<S>(call.grad_query, call) && worth_streaming<S>(call.grad_key, call) &&
                  worth_streaming<S>(call.grad_value, call)) {}

    void run() const {
        Arena count;
        Scratch(plan, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, arena);
            for (int64_t i = first; i < last; ++i) {
                const Task task(call, plan, i);
                Prefetcher<S> ahead(call, Task(call, plan, min(i + 1, last - 1)),
                                    {{&call.query, left},
                                     {&call.key, left + right},
                                     {&call.value, left + right},
                                     {&call.grad_out, left},
                                     {&call.grad_query, 0},
                                     {&call.grad_key, 0},
                                     {&call.grad_value, 0}},
                                    streams ? 3 : 0);
                mark_existing(max<int64_t>(task.begin - right, 0) - left, call.T, plan.key_columns, scratch.exists);
                for (int64_t s = 0; s < task.sequences; ++s) sequence(task, task.first_sequence + s, ahead, scratch);
            }
        });
    }

  private:
    void sequence(const Task& task, int64_t index, Prefetcher<S>& ahead, const Scratch& scratch) const {
        constexpr int L = kLanes<A>;
        const int64_t n = index / call.H, h = index % call.H;
        const auto view = [&](const TensorView& tensor) { return Sequence<S>(tensor, call.D, task.b, n, h); };
        const int64_t first_query = max<int64_t>(task.begin - right, 0), last_query = min(task.end + left, call.T);
        const int64_t first_key = max<int64_t>(first_query - left, 0), last_key = min(last_query + right, call.T);

        // Column 0 is key first_query - left, which may lie before the clip.
        const int64_t missing = first_key - (first_query - left);
        const Rows<A> values = view(call.value).rows(first_key, last_key, scratch.rows);
        transpose_rows(values, last_key - first_key, call.D, scratch.value_columns + missing, plan.key_columns);
        const Rows<A> keys = view(call.key).rows(first_key, last_key, scratch.rows);
        transpose_rows(keys, last_key - first_key, call.D, scratch.key_columns + missing, plan.key_columns);
        const Rows<A> queries = view(call.query).rows(first_query, last_query, scratch.query);
        const Rows<A> grad_outs = view(call.grad_out).rows(first_query, last_query, scratch.grad_out);

        const int64_t frames = last_query - first_query;
        for (int64_t t = 0; t < frames; t += L) {
            ahead.fetch_rows(L);
            const auto dots = [&](Rows<A> rows, const A* columns, A* result) {
                transpose_rows({rows[t], rows.stride}, min<int64_t>(L, frames - t), call.D, scratch.query_columns, L);
                band_dots(scratch.query_columns, columns + t, plan.key_columns, call.D, plan.window, result + t,
                          plan.pitch);
            };
            dots(queries, scratch.key_columns, scratch.weights);
            softmax(scratch.weights + t, plan.pitch, plan.window, scratch.exists + t, A(call.scale));
            dots(grad_outs, scratch.value_columns, scratch.grad_scores);
            softmax_gradient(scratch.exists + t, scratch.weights + t, scratch.grad_scores + t);
        }

        // Rows are queries and what they see is keys, or the other way round.
        const Diagonals<A> of_queries = {scratch.grad_scores + (task.begin - first_query), 1 - plan.pitch, plan.pitch};
        gather_frames(plan, task, of_queries, keys, task.begin - left - first_key, last_key - first_key,
                      view(call.grad_query), streams, scratch.out);
        const int64_t first = task.begin - right - first_query;
        const auto of_keys = [&](const A* weights) {
            return Diagonals<A>{weights + (plan.window - 1) * plan.pitch + first, plan.pitch, 1 - plan.pitch};
        };
        gather_frames(plan, task, of_keys(scratch.grad_scores), queries, first, frames, view(call.grad_key), streams,
                      scratch.out);
        gather_frames(plan, task, of_keys(scratch.weights), grad_outs, first, frames, view(call.grad_value), streams,
                      scratch.out);
    }

    // From grad_scores = dp to scale * p * (dp - sum of p dp). The weights come from the scores anew: lse was rounded, and a sum
    // of p a little off 1 would not cancel against dp.
    void softmax_gradient(const Exists<A>* exists, const A* weights, A* grad_scores) const {
        Vec<A> mean = {};
        for (int64_t o = 0; o < plan.window; ++o) {
            const Vec<A> product = load(weights + o * plan.pitch) * load(grad_scores + o * plan.pitch);
            mean += load_mask<A>(exists + o) ? product : Vec<A>{};
        }
        for (int64_t o = 0; o < plan.window; ++o) {
            A* p = grad_scores + o * plan.pitch;
            store(p, load(weights + o * plan.pitch) * (load(p) - mean) * A(call.scale));
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::temporal_window_attention
