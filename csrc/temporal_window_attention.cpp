// Temporal window attention on the CPU: every query attends to the keys of the frames around it in its own sequence.
//
//   out_i = sum_j p_ij v_j,   p_i = softmax over i - left <= j <= i + right of scale * q_i . k_j,   0 <= j < T
//
// A task is one sequence (b, n, h) and one stretch of its time axis; tasks share nothing, and what they compute does
// not depend on who runs them. Within a task queries go in blocks of four. Their windows overlap nearly entirely (16
// keys for a window of 13: one AVX-512 vector), so that a block is two small dense products with a softmax in between,
// all from registers:
//
//   keys ->       x x x x .        scores: four rows of keys at a time, lanes are keys, so that keys are needed as
//   columns queries       . x x x x        output: four rows of channels at a time, lanes are channels, keys are read
//   as they lie
//
#include "temporal_window_attention.h"

#include <limits>

#include "common/banded.h"

namespace tritonkern::TRITONKERN_ISA {
namespace {

// How the work is cut. A task is a stretch of time of a few sequences that are neighbours in memory: `group` of the N * H
// sequences of one batch entry. Reading such a group frame by frame is what memory does best.
template <class S>
struct Plan {
    using A = Accumulator<S>;

    int64_t chunk, chunks, group, groups, tasks, grain, padded_dim, key_columns, weight_stride, batch;
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

template <class A>
void block_rows(Rows<A> rows, int64_t first, int64_t count, const A* (&out)[kBlock]) {
    for (int r = 0; r < kBlock; ++r) out[r] = rows[first + min<int64_t>(r, count - 1)];
}

// Brings the frames of a coming task closer while another one computes, in the order in which they lie in memory. Rows of one
// sequence alone would be a pattern with large steps, which hardware does not foresee. First `reads` tensors, then `writes`.
template <class S, int Reads, int Writes>
class Prefetcher {
    static constexpr int kTensors = Reads + Writes;

    const TemporalWindowAttention& call;
    const Task task;
    const TensorView* const (&tensors)[kTensors];
    const S* rows[kTensors];
    int64_t t, sequence, h;

  public:
    Prefetcher(const TemporalWindowAttention& c, const Task& coming, const TensorView* const (&views)[kTensors])
        : call(c), task(coming), tensors(views), t(coming.begin), sequence(coming.first_sequence) {
        locate();
    }

    TRITONKERN_INLINE void fetch_rows(int64_t count) {
        for (; count > 0 && t < task.end; --count) {
            for (int64_t d = 0; d < call.D; d += kCacheLine / int64_t(sizeof(S))) {
                for (int i = 0; i < Reads; ++i) __builtin_prefetch(rows[i] + d, 0, 2);
                for (int i = Reads; i < kTensors; ++i) __builtin_prefetch(rows[i] + d, 1, 2);
            }
            for (int i = 0; i < kTensors; ++i) rows[i] += tensors[i]->stride[3];
            ++h, ++sequence;
            if (sequence == task.first_sequence + task.sequences) sequence = task.first_sequence, ++t, h = call.H;
            if (h == call.H) locate();
        }
    }

  private:
    void locate() {
        h = sequence % call.H;
        for (int i = 0; i < kTensors; ++i)
            rows[i] = Sequence<S>(*tensors[i], call.D, task.b, sequence / call.H, h).data + t * tensors[i]->stride[1];
    }
};

template <class S>
class Forward {
    using A = Accumulator<S>;
    using Ahead = Prefetcher<S, 3, 1>;

    const TemporalWindowAttention& call;
    const int64_t left, right;
    const Plan<S> plan;

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
          plan(c, left, right, /*longest=*/c.D <= 32 ? 128 : 64, /*halo=*/left + right) {}

    void run() const {
        const TensorView* const tensors[] = {&call.query, &call.key, &call.value, &call.out};
        Arena count;
        Scratch(plan, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, arena);
            for (int64_t i = first; i < last; ++i) {
                const Task task(call, plan, i);
                Ahead ahead(call, Task(call, plan, min(i + 1, last - 1)), tensors);
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
                ahead.fetch_rows(kBlock);
                const A* query[kBlock];
                block_rows(queries, block * kBlock, rows_of(block), query);
                scores(band_of(block), query, scratch.key_columns, weights_of(block), scratch.maximum + block * kBlock);
            }
            for (int64_t block = first; block < first + count; ++block)
                exponentiate(band_of(block).keys, scratch.maximum + block * kBlock, weights_of(block),
                             scratch.total + block * kBlock);
            for (int64_t block = first; block < first + count; ++block) {
                const int64_t start = task.begin + block * kBlock, rows = rows_of(block);
                A factor[kBlock];
                A* target[kBlock];
                for (int r = 0; r < kBlock; ++r) {
                    factor[r] = 1 / scratch.total[block * kBlock + r];
                    target[r] = out.usable_in_place() && r < rows
                                    ? reinterpret_cast<A*>(out.data + (start + r) * out.time_stride)
                                    : scratch.out + r * plan.padded_dim;
                }
                band_gather(band_of(block), weights_of(block), plan.weight_stride, values, factor, target,
                            plan.padded_dim);
                if (!out.usable_in_place()) {
                    for (int64_t r = 0; r < rows; ++r) out.write(start + r, target[r]);
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

    // weights[r][key] = score of the keys that row r sees, else -inf; maximum[r] is the largest.
    void scores(const Band& band, const A* const (&query)[kBlock], const A* key_columns, A* weights, A* maximum) const {
        constexpr int L = kLanes<A>;
        const A scale = A(call.scale), infinity = std::numeric_limits<A>::infinity();
        // A finite start: where all scores are -inf the weights come out as 0, their sum too, and the output as NaN.
        Vec<A> top[kBlock];
        for (int r = 0; r < kBlock; ++r) top[r] = broadcast(std::numeric_limits<A>::lowest());
        band_dots(band, query, key_columns + band.first, plan.key_columns, call.D, [&](int64_t key, auto& tile) {
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
    void exponentiate(int64_t keys, const A* maximum, A* weights, A* total) const {
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
};

template <class S>
class Backward {
    using A = Accumulator<S>;
    using Ahead = Prefetcher<S, 4, 3>;

    const TemporalWindowAttention& call;
    const int64_t left, right;
    const Plan<S> plan;

    struct Scratch {
        A *query, *grad_out, *rows, *key_columns, *value_columns, *grad_key, *grad_value, *weights, *grad_scores, *out;

        // A stretch of keys needs the queries that see them, and those queries need all the keys that they see.
        Scratch(const Plan<S>& plan, int64_t reach, Arena& arena) {
            query = arena.take<A>((plan.chunk + reach) * plan.padded_dim);
            grad_out = arena.take<A>((plan.chunk + reach) * plan.padded_dim);
            rows = arena.take<A>(plan.key_columns * plan.padded_dim);
            key_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            value_columns = arena.take<A>(plan.key_columns * plan.padded_dim);
            grad_key = arena.take<A>(plan.chunk * plan.padded_dim);
            grad_value = arena.take<A>(plan.chunk * plan.padded_dim);
            weights = arena.take<A>(kBlock * plan.weight_stride);
            grad_scores = arena.take<A>(kBlock * plan.weight_stride);
            out = arena.take<A>(kBlock * plan.padded_dim);
        }
    };

  public:
    // Queries next to a stretch are computed by both of its neighbours: a stretch is much longer than what it sees.
    explicit Backward(const TemporalWindowAttention& c)
        : call(c),
          left(min(c.left, c.T - 1)),
          right(min(c.right, c.T - 1)),
          plan(c, left, right, /*longest=*/max<int64_t>(128, 4 * (left + right)), /*halo=*/2 * (left + right)) {}

    void run() const {
        const TensorView* const tensors[] = {&call.query,      &call.key,      &call.value,     &call.grad_out,
                                             &call.grad_query, &call.grad_key, &call.grad_value};
        Arena count;
        Scratch(plan, left + right, count);
        parallel_for(plan.tasks, plan.grain, plan.threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(plan, left + right, arena);
            for (int64_t i = first; i < last; ++i) {
                const Task task(call, plan, i);
                Ahead ahead(call, Task(call, plan, min(i + 1, last - 1)), tensors);
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
        const A* lse = static_cast<const A*>(call.lse) + (task.b * call.T * call.N + n) * call.H + h;

        const int64_t owned = (task.end - task.begin) * plan.padded_dim;
        std::memset(scratch.grad_key, 0, owned * sizeof(A));
        std::memset(scratch.grad_value, 0, owned * sizeof(A));
        for (int64_t start = first_query; start < last_query; start += kBlock) {
            ahead.fetch_rows(kBlock);
            const int64_t rows = min<int64_t>(kBlock, last_query - start);
            const Band band(start, rows, call.T, left, right, first_key);
            const A *query[kBlock], *grad_out[kBlock];
            A row_lse[kBlock];
            block_rows(queries, start - first_query, rows, query);
            block_rows(grad_outs, start - first_query, rows, grad_out);
            for (int64_t r = 0; r < kBlock; ++r) row_lse[r] = lse[(start + min(r, rows - 1)) * call.N * call.H];

            softmax_gradient(band, query, grad_out, row_lse, scratch);
            write_grad_query(band, start, rows, task, keys, view(call.grad_query), scratch);
            // The accumulators hold the keys task.begin..task.end-1 only.
            const int64_t shift = task.begin - first_key;
            const int64_t begin = max<int64_t>(shift - band.first, 0);
            const int64_t end = min(task.end - first_key - band.first, band.keys);
            band_scatter(band, begin, end, scratch.grad_scores, plan.weight_stride, query,
                         scratch.grad_key - shift * plan.padded_dim, plan.padded_dim, plan.padded_dim);
            band_scatter(band, begin, end, scratch.weights, plan.weight_stride, grad_out,
                         scratch.grad_value - shift * plan.padded_dim, plan.padded_dim, plan.padded_dim);
        }
        for (int64_t t = task.begin; t < task.end; ++t) {
            view(call.grad_key).write(t, scratch.grad_key + (t - task.begin) * plan.padded_dim);
            view(call.grad_value).write(t, scratch.grad_value + (t - task.begin) * plan.padded_dim);
        }
    }

    // weights = p, grad_scores = scale * p * (dp - sum of p dp) with dp = grad_out . value, for the keys that each row
    // sees. p is normalised once more: lse was rounded, and a sum of p a little off 1 would not cancel against dp.
    void softmax_gradient(const Band& band, const A* const (&query)[kBlock], const A* const (&grad_out)[kBlock],
                          const A (&lse)[kBlock], const Scratch& scratch) const {
        constexpr int L = kLanes<A>;
        const A scale = A(call.scale);
        const int64_t stride = plan.weight_stride;
        Vec<A> sum[kBlock] = {}, dot[kBlock] = {};
        A total[kBlock], mean[kBlock];
        band_dots(band, query, scratch.key_columns + band.first, plan.key_columns, call.D,
                  [&](int64_t key, auto& tile) {
                      constexpr int vectors = sizeof(tile[0]) / sizeof(tile[0][0]);
                      TRITONKERN_UNROLL
                      for (int r = 0; r < kBlock; ++r) {
                          TRITONKERN_UNROLL
                          for (int v = 0; v < vectors; ++v) {
                              const Vec<A> weight =
                                  band.mask<A>(r, key + v * L) ? exp<A>(tile[r][v] * scale - lse[r]) : Vec<A>{};
                              store(scratch.weights + r * stride + key + v * L, weight);
                              sum[r] += weight;
                          }
                      }
                  });
        reduce<A>(sum, Sum{}, total);
        for (int r = 0; r < kBlock; ++r) {
            for (int64_t key = r * stride; key < r * stride + band.keys; key += L)
                store(scratch.weights + key, load(scratch.weights + key) / total[r]);
        }
        band_dots(
            band, grad_out, scratch.value_columns + band.first, plan.key_columns, call.D, [&](int64_t key, auto& tile) {
                constexpr int vectors = sizeof(tile[0]) / sizeof(tile[0][0]);
                TRITONKERN_UNROLL
                for (int r = 0; r < kBlock; ++r) {
                    TRITONKERN_UNROLL
                    for (int v = 0; v < vectors; ++v) {
                        const int64_t at = r * stride + key + v * L;
                        store(scratch.grad_scores + at, tile[r][v]);
                        dot[r] += band.mask<A>(r, key + v * L) ? load(scratch.weights + at) * tile[r][v] : Vec<A>{};
                    }
                }
            });
        reduce<A>(dot, Sum{}, mean);
        for (int r = 0; r < kBlock; ++r) {
            for (int64_t key = r * stride; key < r * stride + band.keys; key += L) {
                A* grad = scratch.grad_scores + key;
                store(grad, load(scratch.weights + key) * (load(grad) - mean[r]) * scale);
            }
        }
    }

    void write_grad_query(const Band& band, int64_t start, int64_t rows, const Task& task, Rows<A> keys,
                          const Sequence<S>& grad_query, const Scratch& scratch) const {
        const int64_t begin = max(start, task.begin), end = min(start + rows, task.end);
        if (begin >= end) return;
        A* target[kBlock];
        A factor[kBlock];
        for (int r = 0; r < kBlock; ++r) {
            target[r] = scratch.out + r * plan.padded_dim;
            factor[r] = 1;
        }
        band_gather(band, scratch.grad_scores, plan.weight_stride, keys, factor, target, plan.padded_dim);
        for (int64_t t = begin; t < end; ++t) grad_query.write(t, target[t - start]);
    }
};

template <class Run>
void for_dtype(DType dtype, const Run& run) {
    switch (dtype) {
        case DType::kFloat64:
            return run(double{});
        case DType::kFloat32:
            return run(float{});
        case DType::kBFloat16:
            return run(BFloat16{});
        case DType::kFloat16:
            return run(Float16{});
    }
}

}  // namespace

void temporal_window_attention_forward(const TemporalWindowAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Forward<decltype(element)>(call).run(); });
}

void temporal_window_attention_backward(const TemporalWindowAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Backward<decltype(element)>(call).run(); });
}

}  // namespace tritonkern::TRITONKERN_ISA
