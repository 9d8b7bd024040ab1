// A transformer block over time, forward, for few channels:
//
//   x --LayerNorm--> normed --weights--> query, key, value --window attention, head by head--> --weights--> + x
//
// A task owns some positions, or of a long clip a stretch of time of one position. Its rows lie in scratch memory that stays in
// the second-level cache beside the weights; key and value of the frames around a stretch are computed again by both of its
// neighbours. Memory sees one read of x and one write of the result. What a task computes does not depend on who runs it.
#include <algorithm>
#include <cmath>

#include "common/product.h"
#include "common/rows.h"
#include "temporal_block/call.h"
#include "temporal_window_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA {
namespace {

template <class A>
class Block {
    static constexpr int L = kLanes<A>, kWide = kCols<A>;

    const TemporalBlock& call;
    const int64_t C, D, left, right, window;
    int64_t chunk, chunks, group, groups, tasks, rows;  // a task has up to `rows` rows: frames with those around them
    int64_t padded, panels, panel, pitch, padded_dim, scores_pitch, key_columns;
    int threads;
    Buffer<A> weights;  // of query, key, value and projection: panels of kWide outputs, input after input

    struct Scratch {
        A *normed, *query, *key, *value;  // [rows, pitch]; attention writes over `normed`, the projection over `query`
        A *products, *scores, *query_columns, *key_columns, *spare, *norm_weight, *norm_bias, *biases;
        Exists<A>* exists;

        Scratch(const Block& block, Arena& arena) {
            for (A** buffer : {&normed, &query, &key, &value}) *buffer = arena.take<A>(block.rows * block.pitch);
            products = arena.take<A>(block.rows * kWide);
            scores = arena.take<A>(block.window * block.scores_pitch);
            query_columns = arena.take<A>(L * block.padded_dim);
            key_columns = arena.take<A>(block.key_columns * block.padded_dim);
            spare = arena.take<A>(block.pitch);
            norm_weight = arena.take<A>(block.padded);
            norm_bias = arena.take<A>(block.padded);
            biases = arena.take<A>(4 * block.panels * kWide);
            exists = arena.take<Exists<A>>(block.key_columns);
            if (!normed) return;
            const TemporalBlock& call = block.call;
            block.parameter(call.norm_weight, 0, norm_weight, block.padded);
            block.parameter(call.norm_bias, 0, norm_bias, block.padded);
            for (int64_t m = 0; m < 4; ++m)
                block.parameter(m < 3 ? call.qkv_bias : call.proj_bias, m < 3 ? m * block.C : 0,
                                biases + m * block.panels * kWide, block.panels * kWide);
        }
    };

    // C numbers, zero where there are none and up to `size`.
    void parameter(const void* from, int64_t offset, A* to, int64_t size) const {
        std::fill(to, to + size, A(0));
        if (from) std::copy_n(static_cast<const A*>(from) + offset, C, to);
    }

  public:
    explicit Block(const TemporalBlock& c)
        : call(c),
          C(c.C),
          D(c.C / c.H),
          left(min(c.left, c.T - 1)),
          right(min(c.right, c.T - 1)),
          window(left + right + 1) {
        // Queries next to a stretch cost their keys again: it is much longer than what it sees.
        chunks = ceil_div(call.T, max<int64_t>(128, 4 * (left + right)));
        chunk = ceil_div(call.T, chunks);
        chunks = ceil_div(call.T, chunk);
        // Every panel of weights comes from the second-level cache once for all rows of a task.
        group = chunks > 1 ? 1 : min(call.N, max<int64_t>(1, 96 / call.T));
        groups = ceil_div(call.N, group);
        tasks = call.B * chunks * groups;
        rows = group * min(call.T, chunk + left + right);
        padded = round_up(C, L), panels = ceil_div(C, int64_t(kWide)), panel = padded * kWide;
        // Odd numbers of vectors keep a column of rows off the same cache sets. The last head may be read beyond its end.
        pitch = (panels * kWide) | L;
        padded_dim = round_up(D, L);
        scores_pitch = round_up(round_up(chunk, kBlock), L) | L;
        key_columns = (scores_pitch + round_up(window - 1, L) + L) | L;
        // Waking a thread costs some microseconds; give it at least that much work.
        const int64_t work = call.B * call.T * call.N * C * C * 4;
        threads = int(max<int64_t>(1, min<int64_t>(call.num_threads, work >> 20)));
    }

    void run() {
        pack();
        Arena count;
        Scratch(*this, count);
        parallel_for(tasks, 1, threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            const Scratch scratch(*this, arena);
            for (int64_t i = first; i < last; ++i) task(i, scratch);
        });
    }

  private:
    void pack() {
        weights = allocate<A>(4 * panels * panel);
        const int64_t bytes = panel * int64_t(sizeof(A));
        parallel_for(4 * panels, 1, threads, bytes, [&](int64_t first, int64_t last, Arena arena) {
            A* const outputs = arena.take<A>(panel);
            for (int64_t i = first; i < last; ++i) {
                const int64_t matrix = i / panels, begin = i % panels * kWide;
                const A* from = static_cast<const A*>(matrix < 3 ? call.qkv_weight : call.proj_weight);
                from += (matrix < 3 ? matrix * C + begin : begin) * C;
                std::fill(outputs, outputs + panel, A(0));
                for (int64_t o = 0; o < min<int64_t>(kWide, C - begin); ++o)
                    std::copy_n(from + o * C, C, outputs + o * padded);
                transpose_rows<A>({outputs, padded}, kWide, C, weights.get() + i * panel, kWide);
            }
        });
    }

    void task(int64_t index, const Scratch& s) const {
        const int64_t first_position = index % groups * group;
        const int64_t positions = min(group, call.N - first_position);
        const int64_t begin = index / groups % chunks * chunk, b = index / groups / chunks;
        const int64_t end = min(begin + chunk, call.T);
        const int64_t first_key = max<int64_t>(begin - left, 0), last_key = min(end + right, call.T);
        const int64_t keys = last_key - first_key, frames = end - begin, before = begin - first_key;
        // Either there is one position, or there are no frames around the own ones.
        const int64_t own = before * pitch, own_rows = positions * frames;
        const auto offset = [&](int64_t t, int64_t p) {
            return b * call.stride[0] + t * call.stride[1] + (first_position + p) * call.stride[2];
        };

        for (int64_t t = 0; t < keys; ++t)
            for (int64_t p = 0; p < positions; ++p) {
                A* const row = s.normed + (p * keys + t) * pitch;
                read_row(call.dtype, call.x, offset(first_key + t, p), C, row);
                normalise(row, s);
            }
        multiply(0, own_rows, s.normed + own, s.query + own, s);
        multiply(1, positions * keys, s.normed, s.key, s);
        multiply(2, positions * keys, s.normed, s.value, s);
        mark_existing(begin - left, call.T, key_columns, s.exists);
        for (int64_t p = 0; p < positions; ++p)
            for (int64_t h = 0; h < call.H; ++h) attend(p * keys * pitch + h * D, begin, frames, first_key, keys, s);
        multiply(3, own_rows, s.normed + own, s.query + own, s);
        for (int64_t t = 0; t < frames; ++t)
            for (int64_t p = 0; p < positions; ++p) {
                const A* const update = s.query + (p * keys + before + t) * pitch;
                read_row(call.dtype, call.x, offset(begin + t, p), C, s.spare);
                for (int64_t c = 0; c < padded; c += L) store(s.spare + c, load(s.spare + c) + load(update + c));
                const int64_t to = ((b * call.T + begin + t) * call.N + first_position + p) * C;
                write_row(call.dtype, s.spare, call.out, to, C);
            }
    }

    void normalise(A* row, const Scratch& s) const {
        const auto clear = [&] { std::fill(row + C, row + padded, A(0)); };
        clear();
        const A mean = row_sum<A>(padded, [&](int64_t c) { return load(row + c); }) / A(C);
        for (int64_t c = 0; c < padded; c += L) store(row + c, load(row + c) - mean);
        clear();
        const A variance = row_sum<A>(padded, [&](int64_t c) { return load(row + c) * load(row + c); }) / A(C);
        const A scale = 1 / std::sqrt(variance + A(call.eps));
        for (int64_t c = 0; c < padded; c += L)
            store(row + c, load(row + c) * scale * load(s.norm_weight + c) + load(s.norm_bias + c));
    }

    // out = in @ weights[matrix]^T + bias
    void multiply(int64_t matrix, int64_t count, const A* in, A* out, const Scratch& s) const {
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t i = matrix * panels + p;
            product<A, false>(count, C, 1, in, pitch, weights.get() + i * panel, 0, s.products, 0, false);
            const Vec<A> low = load(s.biases + i * kWide), high = load(s.biases + i * kWide + L);
            for (int64_t r = 0; r < count; ++r) {
                A* const to = out + r * pitch + p * kWide;
                store(to, load(s.products + r * kWide) + low);
                store(to + L, load(s.products + r * kWide + L) + high);
            }
        }
    }

    // One head of one position, whose first row and channel lie at `at`: temporal_window_attention/forward.h on scratch memory.
    // Channels beyond the head's are written as well; the next head, which comes later, puts them right.
    void attend(int64_t at, int64_t begin, int64_t frames, int64_t first_key, int64_t keys, const Scratch& s) const {
        const A scale = 1 / std::sqrt(A(D));
        const int64_t own = at + (begin - first_key) * pitch;
        // Column 0 is key begin - left, which may lie before the clip.
        const int64_t missing = first_key - (begin - left);
        transpose_rows<A>({s.key + at, pitch}, keys, D, s.key_columns + missing, key_columns);
        for (int64_t t = 0; t < frames; t += L) {
            transpose_rows<A>({s.query + own + t * pitch, pitch}, min<int64_t>(L, frames - t), D, s.query_columns, L);
            band_dots(s.query_columns, s.key_columns + t, key_columns, D, window, s.scores + t, scores_pitch);
            softmax(s.scores + t, scores_pitch, window, s.exists + t, scale);
        }
        for (int64_t t = 0; t < frames; t += kBlock) {
            A* target[kBlock];
            for (int r = 0; r < kBlock; ++r) target[r] = t + r < frames ? s.normed + own + (t + r) * pitch : s.spare;
            band_gather<A>(Band(t - missing, window, keys), {s.scores + t, 1 - scores_pitch, scores_pitch},
                           {s.value + at, pitch}, target, padded_dim);
        }
    }
};

}  // namespace

void temporal_block_forward(const TemporalBlock& call) {
    if (call.dtype == DType::kFloat64) return Block<double>(call).run();
    Block<float>(call).run();
}

}  // namespace tritonkern::TRITONKERN_ISA
