// How temporal window attention is cut into tasks, and what makes their way through memory fast.
#pragma once

#include "common/banded.h"
#include "temporal_window_attention/call.h"

namespace tritonkern::TRITONKERN_ISA {

// How the work is cut. A task is a stretch of time of a few sequences that are neighbours in memory: `group` of the N * H
// sequences of one batch entry. Reading such a group frame by frame is what memory does best.
template <class S>
struct Plan {
    using A = Accumulator<S>;

    int64_t chunk, chunks, group, groups, tasks, grain, dim, padded_dim, key_columns, weight_stride, batch;
    int threads;

    Plan(const TemporalWindowAttention& call, int64_t left, int64_t right, int64_t longest, int64_t halo) {
        chunks = ceil_div(call.T, longest);
        chunk = round_up(ceil_div(call.T, chunks), kBlock);
        chunks = ceil_div(call.T, chunk);
        // Two groups, the current one and the next, of three tensors should fit into a second-level cache.
        constexpr int64_t group_bytes = 128 << 10;
        const int64_t sequences = call.N * call.H;
        group = min(sequences, max<int64_t>(1, group_bytes / (chunk * call.D * int64_t(sizeof(S)))));
        groups = ceil_div(sequences, group);
        tasks = call.B * chunks * groups;
        dim = call.D;
        padded_dim = round_up(call.D, kLanes<A>);
        // An odd number of vectors: a power of two would put all rows of a column into the same cache sets.
        key_columns = (round_up(min(call.T, chunk + halo), kLanes<A>) + kLanes<A>) | kLanes<A>;
        weight_stride = round_up(min(call.T, left + right + kBlock), 2 * kLanes<A>);
        // The weights of a batch should stay in the first-level cache.
        batch = max<int64_t>(1, min<int64_t>(8, 8192 / (kBlock * weight_stride * int64_t(sizeof(A)))));
        // Waking a thread costs some microseconds; give it at least that much work.
        const int64_t work = call.B * call.T * sequences * (left + right + kBlock) * call.D;
        threads = int(max<int64_t>(1, min<int64_t>(call.num_threads, work >> 17)));
        grain = ceil_div(tasks, int64_t(threads) * 16);
    }
};

struct Task {
    int64_t b, begin, end;              // frames begin..end-1
    int64_t first_sequence, sequences;  // of the N * H, heads fastest

    template <class S>
    Task(const TemporalWindowAttention& call, const Plan<S>& plan, int64_t index) {
        first_sequence = index % plan.groups * plan.group, index /= plan.groups;
        sequences = min(plan.group, call.N * call.H - first_sequence);
        begin = index % plan.chunks * plan.chunk, b = index / plan.chunks;
        end = min(begin + plan.chunk, call.T);
    }
};

// Whether a result is so large that it leaves the caches before anyone reads it. Then it is written past them, in whole cache
// lines: an ordinary write of a line that is not in a cache reads it first.
template <class S>
inline bool worth_streaming(const TensorView& result, const TemporalWindowAttention& call) {
    constexpr int64_t large = 32 << 20;
    const int64_t row = call.D * int64_t(sizeof(S));
    return row % kCacheLine == 0 && reinterpret_cast<uintptr_t>(result.data) % kCacheLine == 0 &&
           call.B * call.T * call.N * call.H * row >= large;
}

// The rows first..first+count-1; those missing from a block repeat the last one.
template <class A>
inline void block_rows(Rows<A> rows, int64_t first, int64_t count, const A* (&out)[kBlock]) {
    for (int r = 0; r < kBlock; ++r) out[r] = rows[first + min<int64_t>(r, count - 1)];
}

// Brings the frames of a coming task closer while another one computes, in the order in which they lie in memory. Rows of one
// sequence alone would be a pattern with large steps, which hardware does not foresee.
template <class S, int Reads, int Writes>
class Prefetcher {
  public:
    struct Target {
        const TensorView* tensor;
        int64_t later;  // frames: those before were read by the task before
    };
    using Targets = Target[Reads + Writes];  // those that are read come first

    Prefetcher(const TemporalWindowAttention& c, const Task& coming, const Targets& list)
        : call(c), task(coming), targets(list), t(coming.begin), sequence(coming.first_sequence) {
        locate();
    }

    // `writes` is Writes, or 0 where results bypass the caches.
    TRITONKERN_INLINE void fetch_rows(int64_t rows, int writes) {
        for (; rows > 0 && t < task.end; --rows) {
            for (int64_t d = 0; d < call.D; d += kCacheLine / int64_t(sizeof(S))) {
                for (int i = 0; i < Reads; ++i) __builtin_prefetch(row[i] + d, 0, 2);
                for (int i = Reads; i < Reads + writes; ++i) __builtin_prefetch(row[i] + d, 1, 2);
            }
            for (int i = 0; i < Reads + Writes; ++i) row[i] += targets[i].tensor->stride[3];
            ++h, ++sequence;
            if (sequence == task.first_sequence + task.sequences) sequence = task.first_sequence, ++t, h = call.H;
            if (h == call.H) locate();
        }
    }

  private:
    void locate() {
        h = sequence % call.H;
        for (int i = 0; i < Reads + Writes; ++i) {
            const TensorView& tensor = *targets[i].tensor;
            const int64_t frame = min(t + targets[i].later, call.T - 1);
            row[i] = Sequence<S>(tensor, call.D, task.b, sequence / call.H, h).data + frame * tensor.stride[1];
        }
    }

    const TemporalWindowAttention& call;
    const Task task;
    const Targets& targets;
    const S* row[Reads + Writes];
    int64_t t, sequence, h;
};

// weights[r][key] = score of the keys that row r sees, else -inf; maximum[r] is the largest. The scores are rounded here, once,
// for the maximum and for the exponential alike: fused into the subtraction of one, a large score would miss the other.
template <class S, class A = Accumulator<S>>
void scores(const Plan<S>& plan, const Band& band, const A* const (&query)[kBlock], const A* key_columns, A scale,
            A* weights, A* maximum) {
    constexpr int L = kLanes<A>;
    constexpr A infinity = std::numeric_limits<A>::infinity();
    // A finite start: where all scores are -inf the weights come out as 0, their sum too, and the output as NaN.
    Vec<A> top[kBlock];
    for (int r = 0; r < kBlock; ++r) top[r] = broadcast(std::numeric_limits<A>::lowest());
    band_dots(band, query, key_columns + band.first, plan.key_columns, plan.dim, [&](int64_t key, auto& tile) {
        constexpr int vectors = sizeof(tile[0]) / sizeof(tile[0][0]);
        TRITONKERN_UNROLL
        for (int r = 0; r < kBlock; ++r) {
            TRITONKERN_UNROLL
            for (int v = 0; v < vectors; ++v) {
                const Vec<A> score = band.mask<A>(r, key + v * L) ? tile[r][v] * scale : broadcast(-infinity);
                store(weights + r * plan.weight_stride + key + v * L, score);
                top[r] = score > top[r] ? score : top[r];
            }
        }
    });
    reduce<A>(top, Maximum{}, maximum);
}

// weights[r][key] = exp(score - maximum[r]), and their sums.
template <class S, class A = Accumulator<S>>
void exponentiate(const Plan<S>& plan, int64_t keys, const A* maximum, A* weights, A* total) {
    Vec<A> sum[kBlock] = {};
    for (int64_t key = 0; key < keys; key += kLanes<A>) {
        TRITONKERN_UNROLL
        for (int r = 0; r < kBlock; ++r) {
            A* p = weights + r * plan.weight_stride + key;
            const Vec<A> weight = exp<A>(load(p) - maximum[r]);
            store(p, weight);
            sum[r] += weight;
        }
    }
    reduce<A>(sum, Sum{}, total);
}

}  // namespace tritonkern::TRITONKERN_ISA
