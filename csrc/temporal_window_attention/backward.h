// Gradients of temporal window attention. With p recomputed from the scores, and dp_ij = grad_out_i . v_j:
//
//   ds_ij = scale * p_ij * (dp_ij - sum_k p_ik dp_ik)
//   grad_query_i = sum_j ds_ij k_j,   grad_key_j = sum_i ds_ij q_i,   grad_value_j = sum_i p_ij grad_out_i
//
// Time is that of the keys: query i stands at key i + offset, and is called by that number here.
//
// A task owns a stretch of keys and of queries. It computes every query that sees one of its keys, those of its neighbours
// included, so that no task adds to the result of another. With a wide window it walks over these queries in blocks, and adds
// up what each block gives to the gradients of keys and values: scratch memory grows with the window, not with its square.
#pragma once

#include <algorithm>

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
        A *part, *grad_key, *grad_value;  // in blocks: [chunk, padded_dim], what one block gives, and the sums
        Exists<A>* exists;

        // A stretch of keys needs the queries that see them, and those queries need all the keys that they see.
        Scratch(const Plan<S>& plan, Arena& arena) {
            query = arena.take<A>(plan.queries * plan.padded_dim);
            grad_out = arena.take<A>(plan.queries * plan.padded_dim);
            rows = arena.take<A>(plan.key_columns * plan.padded_dim);
            query_columns = arena.take<A>(kLanes<A> * plan.padded_dim);
            key_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            value_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            weights = arena.take<A>(plan.window * plan.pitch);
            grad_scores = arena.take<A>(plan.window * plan.pitch);
            out = arena.take<A>(kBlock * plan.padded_dim);
            exists = arena.take<Exists<A>>(plan.key_columns);
            const int64_t sums = plan.block < plan.queries ? plan.chunk * plan.padded_dim : 0;
            part = arena.take<A>(sums), grad_key = arena.take<A>(sums), grad_value = arena.take<A>(sums);
        }
    };

  public:
    // Queries next to a stretch are computed by both of its neighbours: a stretch is much longer than what it sees.
    explicit Backward(const TemporalWindowAttention& c)
        : call(c),
          left(min(c.left, c.offset + c.T - 1)),
          right(min(c.right, c.S - 1 - c.offset)),
          plan(c, c.S, left, right, /*longest=*/max<int64_t>(128, 4 * (left + right)),
               /*queries_around=*/left + right),
          streams(worth_streaming<S>(call.grad_query, call.T, call) &&
                  worth_streaming<S>(call.grad_key, call.S, call) &&
                  worth_streaming<S>(call.grad_value, call.S, call)) {}

    void run() const {
        Arena count;
        Scratch(plan, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, arena);
            for (int64_t i = first; i < last; ++i) {
                const Task task(call, plan, i);
                Prefetcher<S> ahead(call, Task(call, plan, min(i + 1, last - 1)),
                                    {{&call.query, left - call.offset, call.T},
                                     {&call.key, left + right, call.S},
                                     {&call.value, left + right, call.S},
                                     {&call.grad_out, left - call.offset, call.T},
                                     {&call.grad_query, -call.offset, call.T},
                                     {&call.grad_key, 0, call.S},
                                     {&call.grad_value, 0, call.S}},
                                    streams ? 3 : 0);
                mark_existing(max(task.begin - right, call.offset) - left, call.S, plan.key_columns, scratch.exists);
                for (int64_t s = 0; s < task.sequences; ++s) sequence(task, task.first_sequence + s, ahead, scratch);
            }
        });
    }

  private:
    void sequence(const Task& task, int64_t index, Prefetcher<S>& ahead, const Scratch& scratch) const {
        const int64_t n = index / call.H, h = index % call.H;
        const auto view = [&](const TensorView& tensor) { return Sequence<S>(tensor, call.D, task.b, n, h); };
        const int64_t first_query = max(task.begin - right, call.offset);
        const int64_t last_query = min(task.end + left, call.offset + call.T);
        if (first_query >= last_query) {  // no query sees these keys
            std::fill_n(scratch.out, plan.padded_dim, A(0));
            for (int64_t t = task.begin; t < task.end; ++t) {
                view(call.grad_key).write(t, scratch.out, streams);
                view(call.grad_value).write(t, scratch.out, streams);
            }
            return;
        }
        const int64_t first_key = max<int64_t>(first_query - left, 0), last_key = min(last_query + right, call.S);

        // Column 0 is key first_query - left, which may be before the clip.
        const int64_t missing = first_key - (first_query - left);
        const Rows<A> values = view(call.value).rows(first_key, last_key, scratch.rows);
        transpose_rows(values, last_key - first_key, call.D, scratch.value_columns + missing, plan.key_columns);
        const Rows<A> keys = view(call.key).rows(first_key, last_key, scratch.rows);
        transpose_rows(keys, last_key - first_key, call.D, scratch.key_columns + missing, plan.key_columns);
        const auto of_queries = [&](const TensorView& tensor, A* copy) {
            return view(tensor).rows(first_query - call.offset, last_query - call.offset, copy);
        };
        const Rows<A> queries = of_queries(call.query, scratch.query);
        const Rows<A> grad_outs = of_queries(call.grad_out, scratch.grad_out);

        const bool in_blocks = plan.block < plan.queries;
        if (in_blocks) {
            std::fill_n(scratch.grad_key, (task.end - task.begin) * plan.padded_dim, A(0));
            std::fill_n(scratch.grad_value, (task.end - task.begin) * plan.padded_dim, A(0));
        }
        for (int64_t q = first_query; q < last_query; q += plan.block) {
            const int64_t count = min(plan.block, last_query - q), before = q - first_query;
            const Rows<A> block_queries = {queries[before], queries.stride};
            const Rows<A> block_grad_outs = {grad_outs[before], grad_outs.stride};
            weigh(block_queries, block_grad_outs, before, count, ahead, scratch);

            // Rows are queries and what they see is keys, or the other way round.
            const int64_t begin = max(q, task.begin);
            const Diagonals<A> grad_scores = {scratch.grad_scores + (begin - q), 1 - plan.pitch, plan.pitch};
            gather_frames<S>(plan.window, plan.padded_dim, begin - call.offset, min(q + count, task.end) - call.offset,
                             grad_scores, keys, begin - left - first_key, last_key - first_key, view(call.grad_query),
                             streams, scratch.out);
            if (in_blocks) {
                add_block(task, q, count, scratch.grad_scores, block_queries, scratch, scratch.grad_key);
                add_block(task, q, count, scratch.weights, block_grad_outs, scratch, scratch.grad_value);
            } else {
                const auto gather = [&](const A* weights, const Rows<A>& rows, const TensorView& grad) {
                    gather_frames<S>(plan.window, plan.padded_dim, task.begin, task.end,
                                     of_keys(weights, task.begin - right - q), rows, task.begin - right - q, count,
                                     view(grad), streams, scratch.out);
                };
                gather(scratch.grad_scores, queries, call.grad_key);
                gather(scratch.weights, grad_outs, call.grad_value);
            }
        }
        if (in_blocks) {
            for (int64_t t = task.begin; t < task.end; ++t) {
                const int64_t row = (t - task.begin) * plan.padded_dim;
                view(call.grad_key).write(t, scratch.grad_key + row, streams);
                view(call.grad_value).write(t, scratch.grad_value + row, streams);
            }
        }
    }

    // Weights and gradients of the scores of `count` queries, of which the first is query `before` of the task.
    void weigh(Rows<A> queries, Rows<A> grad_outs, int64_t before, int64_t count, Prefetcher<S>& ahead,
               const Scratch& scratch) const {
        constexpr int L = kLanes<A>;
        for (int64_t t = 0; t < count; t += L) {
            ahead.fetch_rows(L);
            const auto dots = [&](Rows<A> rows, const A* columns, A* result) {
                transpose_rows({rows[t], rows.stride}, min<int64_t>(L, count - t), call.D, scratch.query_columns, L);
                band_dots(scratch.query_columns, columns + before + t, plan.key_columns, call.D, plan.window,
                          result + t, plan.pitch);
            };
            const Exists<A>* exists = scratch.exists + before + t;
            dots(queries, scratch.key_columns, scratch.weights);
            softmax(scratch.weights + t, plan.pitch, plan.window, exists, A(call.scale));
            dots(grad_outs, scratch.value_columns, scratch.grad_scores);
            softmax_gradient(exists, scratch.weights + t, scratch.grad_scores + t);
        }
    }

    // The weights as the keys see them; `first` is the query that the first key sees first, counted from the block's.
    Diagonals<A> of_keys(const A* weights, int64_t first) const {
        return {weights + (plan.window - 1) * plan.pitch + first, plan.pitch, 1 - plan.pitch};
    }

    // Adds to `sums` what queries q..q+count-1 give to the keys of the task that they see.
    void add_block(const Task& task, int64_t q, int64_t count, const A* weights, Rows<A> rows, const Scratch& scratch,
                   A* sums) const {
        const int64_t begin = max(task.begin, q - left), end = min(task.end, q + count + right);
        TensorView part;
        part.data = scratch.part, part.stride[1] = plan.padded_dim, part.stride[4] = 1;
        gather_frames<A>(plan.window, plan.padded_dim, 0, end - begin, of_keys(weights, begin - right - q), rows,
                         begin - right - q, count, Sequence<A>(part, plan.padded_dim, 0, 0, 0), false, scratch.out);
        A* const to = sums + (begin - task.begin) * plan.padded_dim;
        for (int64_t i = 0; i < (end - begin) * plan.padded_dim; i += kLanes<A>)
            store(to + i, load(to + i) + load(scratch.part + i));
    }

    // From grad_scores = dp to scale * p * (dp - sum of p dp). The weights come from the scores again: lse was rounded, and a sum
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
