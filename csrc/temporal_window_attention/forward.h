// Output and log-sum-exp of temporal window attention, with s_ij = scale * q_i . k_j:
//
//   lse_i = log sum_j exp(s_ij),   out_i = sum_j exp(s_ij - lse_i) v_j
//
// Query i stands at key i + offset, and key j is stored in row (start + j) % S.
#pragma once

#include <limits>

#include "temporal_window_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA::temporal_window_attention {

template <class S>
class Forward {
    using A = Accumulator<S>;

    const TemporalWindowAttention& call;
    const int64_t left, right;
    const Plan<S> plan;
    const bool streams;  // results bypass the caches

    struct Scratch {
        A *query, *rows, *query_columns, *key_columns, *weights, *out, *lse;
        Exists<A>* exists;

        Scratch(const Plan<S>& plan, Arena& arena) {
            query = arena.take<A>(plan.pitch * plan.padded_dim);
            rows = arena.take<A>(plan.key_columns * plan.padded_dim);
            query_columns = arena.take<A>(kLanes<A> * plan.padded_dim);
            key_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            weights = arena.take<A>(plan.window * plan.pitch);
            out = arena.take<A>(kBlock * plan.padded_dim);
            lse = arena.take<A>(plan.pitch);
            exists = arena.take<Exists<A>>(plan.key_columns);
        }
    };

  public:
    explicit Forward(const TemporalWindowAttention& c)
        : call(c),
          left(min(c.left, c.offset + c.T - 1)),
          right(min(c.right, c.S - 1 - c.offset)),
          plan(c, c.T, left, right, /*longest=*/64, /*queries_around=*/0),
          streams(worth_streaming<S>(call.out, call.T, call)) {}

    void run() const {
        Arena count;
        Scratch(plan, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, arena);
            for (int64_t i = first; i < last; ++i) {
                const Task task(call, plan, i);
                Prefetcher<S> ahead(call, Task(call, plan, min(i + 1, last - 1)),
                                    {{&call.query, 0, call.T},
                                     {&call.key, call.offset + right, call.S},
                                     {&call.value, call.offset + right, call.S},
                                     {&call.out, 0, call.T}},
                                    streams ? 1 : 0);
                mark_existing(task.begin + call.offset - left, call.S, plan.key_columns, scratch.exists);
                for (int64_t s = 0; s < task.sequences; ++s) sequence(task, task.first_sequence + s, ahead, scratch);
            }
        });
    }

  private:
    void sequence(const Task& task, int64_t index, Prefetcher<S>& ahead, const Scratch& scratch) const {
        constexpr int L = kLanes<A>;
        const int64_t n = index / call.H, h = index % call.H;
        const auto view = [&](const TensorView& tensor) { return Sequence<S>(tensor, call.D, task.b, n, h); };
        const int64_t frames = task.end - task.begin;

        // Column 0 is key `column`, which may be before the clip.
        const int64_t column = task.begin + call.offset - left;
        const int64_t first_key = max<int64_t>(column, 0), last_key = min(task.end + call.offset + right, call.S);
        const Rows<A> keys = ring_rows(view(call.key), first_key, last_key, scratch.rows);
        transpose_rows(keys, last_key - first_key, call.D, scratch.key_columns + (first_key - column),
                       plan.key_columns);
        const Rows<A> queries = view(call.query).rows(task.begin, task.end, scratch.query);
        A* lse = static_cast<A*>(call.lse) + ((task.b * call.T + task.begin) * call.N + n) * call.H + h;
        for (int64_t t = 0; t < frames; t += L) {
            ahead.fetch_rows(L);
            A* weights = scratch.weights + t;
            transpose_rows({queries[t], queries.stride}, min<int64_t>(L, frames - t), call.D, scratch.query_columns, L);
            band_dots(scratch.query_columns, scratch.key_columns + t, plan.key_columns, call.D, plan.window, weights,
                      plan.pitch);
            store(scratch.lse + t, softmax(weights, plan.pitch, plan.window, scratch.exists + t, A(call.scale)));
        }
        for (int64_t t = 0; t < frames; ++t) lse[t * call.N * call.H] = scratch.lse[t];

        const Rows<A> values = ring_rows(view(call.value), first_key, last_key, scratch.rows);
        gather_frames<S>(plan.window, plan.padded_dim, task.begin, task.end,
                         {scratch.weights, 1 - plan.pitch, plan.pitch}, values, column - first_key,
                         last_key - first_key, view(call.out), streams, scratch.out);
    }

    // Keys or values first..last-1. Those that the end of the ring separates are copied.
    Rows<A> ring_rows(const Sequence<S>& sequence, int64_t first, int64_t last, A* scratch) const {
        const int64_t row = first + call.start < call.S ? first + call.start : first + call.start - call.S;
        const int64_t stop = row + last - first;
        if (stop <= call.S) return sequence.rows(row, stop, scratch);
        sequence.copy_rows(row, call.S, scratch);
        sequence.copy_rows(0, stop - call.S, scratch + (call.S - row) * plan.padded_dim);
        return {scratch, plan.padded_dim};
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::temporal_window_attention
