// How temporal window attention is cut into tasks, and how the tasks read and write memory.
#pragma once

#include <initializer_list>

#include "common/banded.h"
#include "temporal_window_attention/call.h"

namespace tritonkern::TRITONKERN_ISA::temporal_window_attention {

// How the work is cut. A task is a stretch of time of a few sequences that are adjacent in memory: `group` of the N * H
// sequences of one batch entry. Such a group is read frame by frame, in long runs. Time is that of the queries in forward and
// that of the keys in backward.
template <class S>
struct Plan {
    using A = Accumulator<S>;

    int64_t frames, chunk, chunks, group, groups, tasks, grain, window, padded_dim, key_columns;
    int64_t queries;  // per task, rounded up
    int64_t block,
        pitch;  // queries whose weights exist at a time, and their number rounded up: the pitch of a diagonal
    int threads;

    Plan(const TemporalWindowAttention& call, int64_t frames, int64_t left, int64_t right, int64_t longest,
         int64_t queries_around)
        : frames(frames) {
        chunks = ceil_div(frames, longest);
        chunk = round_up(ceil_div(frames, chunks), kBlock);
        chunks = ceil_div(frames, chunk);
        // Two groups, the current one and the next, of three tensors should fit into a second-level cache.
        constexpr int64_t group_bytes = 64 << 10;
        const int64_t sequences = call.N * call.H;
        group = min(sequences, max<int64_t>(1, group_bytes / (chunk * call.D * int64_t(sizeof(S)))));
        groups = ceil_div(sequences, group);
        tasks = call.B * chunks * groups;
        window = left + right + 1;
        padded_dim = round_up(call.D, kLanes<A>);
        // Odd numbers of vectors: a power of two would put all rows of a column into the same cache sets.
        queries = round_up(round_up(min(call.T, chunk + queries_around), kBlock), kLanes<A>) | kLanes<A>;
        key_columns = (queries + round_up(window - 1, kLanes<A>) + kLanes<A>) | kLanes<A>;
        // Where the weights of a task would grow with the square of the window, they are made block by block.
        constexpr int64_t most_weights = 1 << 16, queries_per_block = 64;
        const bool in_blocks = queries > queries_per_block + kBlock && window * queries > most_weights;
        block = in_blocks ? queries_per_block : queries;
        pitch = in_blocks ? round_up(block + kBlock, kLanes<A>) | kLanes<A> : queries;
        // Waking a thread costs some microseconds; give it at least that much work.
        const int64_t work = call.B * frames * sequences * (left + right + kBlock) * call.D;
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
        end = min(begin + plan.chunk, plan.frames);
    }
};

// Whether a result is so large that it leaves the caches before it is read. Then it is written past them, in whole cache lines:
// an ordinary write of a line that is not in a cache reads the line first.
template <class S>
inline bool worth_streaming(const TensorView& result, int64_t frames, const TemporalWindowAttention& call) {
    constexpr int64_t large = 32 << 20;
    const int64_t row = call.D * int64_t(sizeof(S));
    return row % kCacheLine == 0 && reinterpret_cast<uintptr_t>(result.data) % kCacheLine == 0 &&
           call.B * frames * call.N * call.H * row >= large;
}

// Prefetches the frames of the next task while the current one computes, in memory order. The rows of one sequence alone would
// be a pattern with large steps, which the hardware does not predict.
template <class S>
class Prefetcher {
  public:
    struct Target {
        const TensorView* tensor;
        int64_t later;   // frames: those before were read by the task before
        int64_t frames;  // of the tensor
    };

    // Results come last among the targets, and are left out where they bypass the caches.
    Prefetcher(const TemporalWindowAttention& call, const Task& coming, std::initializer_list<Target> targets,
               int64_t left_out)
        : sequences(coming.sequences), t(coming.begin), end(coming.end) {
        const int64_t n = coming.first_sequence / call.H, h = coming.first_sequence % call.H;
        const bool spans = (coming.first_sequence + sequences - 1) / call.H != n;
        for (const Target* target = targets.begin(); target < targets.end() - left_out; ++target) {
            const TensorView& x = *target->tensor;
            // Heads, and positions if there are several, that are not adjacent are left to the hardware.
            const bool dense = x.stride[3] == call.D && (!spans || x.stride[2] == call.H * call.D);
            const int64_t element = sizeof(S), bytes = (dense ? sequences : 1) * call.D * element;
            const char* first = reinterpret_cast<const char*>(Sequence<S>(x, call.D, coming.b, n, h).row(0));
            streams[count++] = {first, x.stride[1] * element, bytes, target->later, target->frames - 1};
        }
    }

    // `rows` rows of one sequence have been computed: as many of the next task are due.
    TRITONKERN_INLINE void fetch_rows(int64_t rows) {
        for (due += rows; due >= sequences && t < end; due -= sequences, ++t) {
            for (int i = 0; i < count; ++i) {
                const Stream& stream = streams[i];
                const int64_t frame = max<int64_t>(min(t + stream.later, stream.last_frame), 0);
                const char* row = stream.first + frame * stream.stride;
                const char *stop = row + stream.bytes, *whole = stop - 3 * kCacheLine;
                for (; row < whole; row += 4 * kCacheLine) {
                    TRITONKERN_UNROLL
                    for (int line = 0; line < 4; ++line) __builtin_prefetch(row + line * kCacheLine, 0, 2);
                }
                for (; row < stop; row += kCacheLine) __builtin_prefetch(row, 0, 2);
            }
        }
    }

  private:
    struct Stream {
        const char* first;  // frame 0
        int64_t stride, bytes, later, last_frame;
    };
    Stream streams[7];
    int count = 0;
    const int64_t sequences;
    int64_t t, due = 0;
    const int64_t end;
};

// Marks of the keys first..first+count-1: -1 for one of the frames 0..S-1, else 0.
template <class A>
using Exists = typename VecTypes<A>::Integer;

template <class Integer>
inline void mark_existing(int64_t first, int64_t S, int64_t count, Integer* exists) {
    for (int64_t i = 0; i < count; ++i) exists[i] = first + i >= 0 && first + i < S ? -1 : 0;
}

// Turns the dot products of a vector of queries into weights, lane by lane. `exists` marks the keys of its
// first lane. Returns the logarithm of the sum of exponentials.
template <class A>
TRITONKERN_INLINE Vec<A> softmax(A* weights, int64_t pitch, int64_t window, const Exists<A>* exists, A scale) {
    constexpr A infinity = std::numeric_limits<A>::infinity();
    // A finite start: where all scores are -inf the weights come out as 0, their sum too, and the output as NaN.
    Vec<A> top = broadcast(std::numeric_limits<A>::lowest());
    // The scores are rounded here, once, for the maximum and for the exponential alike: fused into the subtraction of one, a
    // large score would miss the other.
    for (int64_t o = 0; o < window; ++o) {
        const Vec<A> score = load_mask<A>(exists + o) ? load(weights + o * pitch) * scale : broadcast(-infinity);
        store(weights + o * pitch, score);
        top = score > top ? score : top;
    }
    Vec<A> total = {};
    for (int64_t o = 0; o < window; ++o) {
        const Vec<A> weight = exp<A>(load(weights + o * pitch) - top);
        store(weights + o * pitch, weight);
        total += weight;
    }
    const Vec<A> factor = 1 / total;
    for (int64_t o = 0; o < window; ++o) store(weights + o * pitch, load(weights + o * pitch) * factor);
    return top + log<A>(total);
}

// Writes frames begin..end-1 of one result: the product of the weights with x, of which `count` rows exist. Frame `begin` sees
// the rows first..first+window-1.
template <class S, class A = Accumulator<S>>
void gather_frames(int64_t window, int64_t padded_dim, int64_t begin, int64_t end, Diagonals<A> weights, Rows<A> x,
                   int64_t first, int64_t count, const Sequence<S>& result, bool streams, A* scratch) {
    const bool direct = result.usable_in_place() && !streams;
    for (int64_t t = begin; t < end; t += kBlock) {
        A* target[kBlock];
        for (int r = 0; r < kBlock; ++r)
            target[r] = direct && t + r < end ? reinterpret_cast<A*>(result.row(t + r)) : scratch + r * padded_dim;
        band_gather<A>(Band(first, window, count), weights, x, target, padded_dim);
        if (!direct) {
            for (int64_t r = 0; r < min<int64_t>(kBlock, end - t); ++r) result.write(t + r, target[r], streams);
        }
        first += kBlock;
        weights.data += kBlock * (weights.row + weights.entry);
    }
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_window_attention
