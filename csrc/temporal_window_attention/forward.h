// Output and log-sum-exp of temporal window attention.
#pragma once

#include <limits>

#include "temporal_window_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA {

template <class S>
class Forward {
    using A = Accumulator<S>;
    using Ahead = Prefetcher<S, 3, 1>;

    const TemporalWindowAttention& call;
    const int64_t left, right;
    const Plan<S> plan;
    const bool streams;  // results bypass the caches

    struct Scratch {
        A *query, *rows, *key_columns, *weights, *out, *maximum, *total;

        Scratch(const Plan<S>& plan, Arena& arena) {
            query = arena.take<A>(plan.chunk * plan.padded_dim);
            rows = arena.take<A>(plan.key_columns * plan.padded_dim);
            key_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            weights = arena.take<A>(plan.batch * kBlock * plan.weight_stride);
            out = arena.take<A>(kBlock * plan.padded_dim);
            maximum = arena.take<A>(plan.chunk + kLanes<A>);
            total = arena.take<A>(plan.chunk + kLanes<A>);
        }
    };

  public:
    explicit Forward(const TemporalWindowAttention& c)
        : call(c),
          left(min(c.left, c.T - 1)),
          right(min(c.right, c.T - 1)),
          plan(c, left, right, /*longest=*/64, /*halo=*/left + right),
          streams(worth_streaming<S>(call.out, call)) {}

    void run() const {
        const typename Ahead::Targets targets = {
            {&call.query, 0}, {&call.key, right}, {&call.value, right}, {&call.out, 0}};
        Arena count;
        Scratch(plan, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, arena);
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
        const int64_t first_key = max<int64_t>(task.begin - left, 0), last_key = min(task.end + right, call.T);

        const Rows<A> keys = view(call.key).rows(first_key, last_key, scratch.rows);
        transpose_rows(keys, last_key - first_key, call.D, scratch.key_columns, plan.key_columns);
        const Rows<A> values = view(call.value).rows(first_key, last_key, scratch.rows);
        const Rows<A> queries = view(call.query).rows(task.begin, task.end, scratch.query);
        const Sequence<S> out = view(call.out);
        const bool direct = out.usable_in_place() && !streams;

        // Blocks go in batches, step by step: a step of one block has nothing to wait for from the others.
        const int64_t frames = task.end - task.begin, blocks = ceil_div(frames, kBlock);
        for (int64_t first = 0; first < blocks; first += plan.batch) {
            const int64_t count = min<int64_t>(plan.batch, blocks - first);
            const auto rows_of = [&](int64_t block) { return min<int64_t>(kBlock, frames - block * kBlock); };
            const auto band_of = [&](int64_t block) {
                return Band(task.begin + block * kBlock, rows_of(block), call.T, left, right, first_key);
            };
            const auto weights_of = [&](int64_t block) {
                return scratch.weights + (block - first) * kBlock * plan.weight_stride;
            };
            for (int64_t block = first; block < first + count; ++block) {
                ahead.fetch_rows(kBlock, streams ? 0 : 1);
                const A* query[kBlock];
                block_rows(queries, block * kBlock, rows_of(block), query);
                scores(plan, band_of(block), query, scratch.key_columns, A(call.scale), weights_of(block),
                       scratch.maximum + block * kBlock);
            }
            for (int64_t block = first; block < first + count; ++block)
                exponentiate(plan, band_of(block).keys, scratch.maximum + block * kBlock, weights_of(block),
                             scratch.total + block * kBlock);
            for (int64_t block = first; block < first + count; ++block) {
                const int64_t start = task.begin + block * kBlock, rows = rows_of(block);
                A factor[kBlock];
                A* target[kBlock];
                for (int r = 0; r < kBlock; ++r) {
                    factor[r] = 1 / scratch.total[block * kBlock + r];
                    target[r] = direct && r < rows ? reinterpret_cast<A*>(out.data + (start + r) * out.time_stride)
                                                   : scratch.out + r * plan.padded_dim;
                }
                band_gather(band_of(block), weights_of(block), plan.weight_stride, values, factor, target,
                            plan.padded_dim);
                if (!direct) {
                    for (int64_t r = 0; r < rows; ++r) out.write(start + r, target[r], streams);
                }
            }
        }

        A* lse = static_cast<A*>(call.lse) + (task.b * call.T * call.N + n) * call.H + h;
        for (int64_t t = 0; t < task.end - task.begin; ++t) {
            if (t % kLanes<A> == 0)
                store(scratch.maximum + t, load(scratch.maximum + t) + log<A>(load(scratch.total + t)));
            lse[(task.begin + t) * call.N * call.H] = scratch.maximum[t];
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA
