// The tasks of track attention, and what both passes share.
#pragma once

#include "track_attention/frame.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

// Rows of a batch go through each step together, because the steps of different rows are independent of each other.
constexpr int64_t kBatchRows = 32;
constexpr int64_t kBatchPairs = 2048;
// The rows of one head are far apart in memory, which hardware does not predict: they are prefetched this many rows ahead.
constexpr int64_t kAhead = 24;

// One thread's share of a head: the columns of a frame, packed, and a batch of rows.
template <class S>
struct HeadScratch {
    using A = Accumulator<S>;

    A *key, *value, *query, *weights, *top, *maximum, *total, *out;

    HeadScratch(int64_t columns, int64_t padded_dim, Arena& arena) {
        key = arena.take<A>(columns * padded_dim), value = arena.take<A>(columns * padded_dim);
        query = arena.take<A>(kBatchRows * padded_dim);
        weights = arena.take<A>(max(kBatchPairs, round_up(columns, kListMultiple<A>)));
        top = arena.take<A>(kBatchRows * kLanes<A>);
        maximum = arena.take<A>(kBatchRows), total = arena.take<A>(kBatchRows);
        out = arena.take<A>(padded_dim);
    }
};

// Columns of one head, one after the other.
template <class S, class A = Accumulator<S>>
void pack(const Frame<S>& frame, const FrameRows<S>& from, int64_t h, A* to) {
    const int64_t columns = frame.geometry.columns();
    for (int64_t j = 0; j < columns; ++j) {
        from.prefetch(frame.geometry.column(min(j + kAhead, columns - 1)), h);
        from.read_into(frame.geometry.column(j), h, to + j * frame.padded_dim);
    }
}

// The end of the batch of rows that starts with row `first` of the lists.
template <class A>
int64_t batch_end(const Lists<A>& lists, int64_t first) {
    int64_t last = first + 1;
    while (last < lists.last && last - first < kBatchRows && lists.start[last + 1] - lists.start[first] <= kBatchPairs)
        ++last;
    return last;
}

// Weights of a batch, not normalised: exp(score - maximum), with the rows' maxima and sums of weights.
template <class S, class A = Accumulator<S>>
void weigh(const Frame<S>& frame, const Lists<A>& lists, int64_t first, int64_t last, const FrameRows<S>& queries,
           int64_t h, const HeadScratch<S>& scratch) {
    constexpr int L = kLanes<A>;
    const int64_t origin = lists.start[first], dim = frame.padded_dim;
    const A scale = A(frame.call.scale);
    for (int64_t i = first; i < last; ++i) {
        queries.prefetch(frame.geometry.row(min(i + kAhead, lists.last - 1)), h);
        const A* query = queries.read(frame.geometry.row(i), h, scratch.query + (i - first) * dim);
        const A* bias = lists.bias + lists.start[i];
        A* weights = scratch.weights + lists.start[i] - origin;
        // A finite start: where all scores are -inf, the weights and their sum are 0, and the output is NaN.
        Vec<A> top = broadcast(std::numeric_limits<A>::lowest());
        dot_list(query, scratch.key, dim, lists.column + lists.start[i], lists.count[i],
                 [&](int64_t j, Vec<A> products) __attribute__((always_inline)) {
                     const Vec<A> score = products * scale + load(bias + j);
                     store(weights + j, score);
                     top = score > top ? score : top;
                 });
        store(scratch.top + (i - first) * L, top);
    }
    for (int64_t i = first; i < last; ++i) {
        A* weights = scratch.weights + lists.start[i] - origin;
        const Vec<A> top = detail::fold<A, L / 2>(load(scratch.top + (i - first) * L), Maximum{});
        Vec<A> total = {};
        for (int64_t j = 0; j < lists.count[i]; j += L) {
            const Vec<A> weight = exp<A>(load(weights + j) - top);
            store(weights + j, weight);
            total += weight;
        }
        scratch.maximum[i - first] = top[0];
        scratch.total[i - first] = detail::fold<A, L / 2>(total, Sum{})[0];
    }
}

// Finds the bounds of every frame, then runs its heads. With enough frames each one belongs to one thread, which reads it from
// memory once; otherwise threads share frames. The results are the same.
template <class S>
class Tasks {
    using A = Accumulator<S>;

    const TrackAttention& call;
    const int64_t frames, rows, columns;
    const int threads;
    Bounds bounds;

  public:
    explicit Tasks(const TrackAttention& c)
        : call(c),
          frames(c.B * c.T),
          rows(c.splat ? c.height * c.width : c.M),
          columns(c.splat ? c.M : c.height * c.width),
          threads(int(max<int64_t>(1, min<int64_t>(c.num_threads, c.B * c.T * (rows + columns) * c.H * c.D >> 16)))),
          bounds(frames, rows, c.H) {}

    // head(frame, bounds, lists, h, scratch) with Scratch(columns, padded_dim, arena)
    template <class Scratch, class Head>
    void run(const Head& head) {
        const auto work = [&](int64_t index, int64_t first_head, int64_t last_head, Arena arena, bool bound) {
            Frame<S> frame(call, arena);
            Lists<A> lists(rows, columns, arena);
            const Scratch scratch(columns, frame.padded_dim, arena);
            frame.enter(index);
            if (bound) {
                frame.find_key_norms(index, 0, call.H, bounds);
                frame.find_reaches(0, frame.geometry.rows(), bounds);
            }
            for (int64_t h = first_head; h < last_head; ++h) head(frame, bounds, lists, h, scratch);
        };
        Arena count;
        const int64_t padded_dim = Frame<S>(call, count).padded_dim;
        Arena all = count;
        Lists<A>(rows, columns, all);
        Scratch(columns, padded_dim, all);

        if (threads == 1 || frames >= 4 * threads) {
            parallel_for(frames, 1, threads, all.used, [&](int64_t first, int64_t last, Arena arena) {
                for (int64_t i = first; i < last; ++i) work(i, 0, call.H, arena, true);
            });
            return;
        }
        parallel_for(frames * call.H, 1, threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Frame<S> frame(call, arena);
            for (int64_t i = first; i < last; ++i) frame.find_key_norms(i / call.H, i % call.H, i % call.H + 1, bounds);
        });
        constexpr int64_t chunk = 1024;
        const int64_t chunks = ceil_div(max<int64_t>(rows, 1), chunk);
        parallel_for(frames * chunks, 1, threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Frame<S> frame(call, arena);
            for (int64_t i = first; i < last; ++i) {
                frame.enter(i / chunks);
                const int64_t begin = i % chunks * chunk;
                frame.find_reaches(begin, min(begin + chunk, frame.geometry.rows()), bounds);
            }
        });
        const int64_t heads = max<int64_t>(1, call.H * frames / (4 * threads)), groups = ceil_div(call.H, heads);
        parallel_for(frames * groups, 1, threads, all.used, [&](int64_t first, int64_t last, Arena arena) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t h = i % groups * heads;
                work(i / groups, h, min(h + heads, call.H), arena, false);
            }
        });
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
