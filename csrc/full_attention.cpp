// Softmax attention of every query to all keys, forward:
//
//   lse_i = log sum_j exp(scale * q_i . k_j),   out_i = sum_j exp(scale * q_i . k_j - lse_i) v_j
//
// on blocks of kQueries x kKeys scores:
//
//   key    --columns--> panels --product--> scores, panel by panel --exp--> weights, row by row
//   value  --rows-----> panels ------------------------------------product--> result, panel by panel
//
// A task owns a stretch of queries of one head. It copies all keys and values of the head once, into panels as wide as a block
// of registers; block after block of queries then visits all of them. The maximum of a row is updated from block to block, and
// what was added under an earlier one is scaled down. The result of a query does not depend on which others share its block.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/product.h"
#include "common/rows.h"
#include "common/strided.h"
#include "full_attention/call.h"

namespace tritonkern::TRITONKERN_ISA::full_attention {
namespace {

// Scores and weights of a block, and the keys and values that make them, share the second-level cache.
constexpr int64_t kQueries = 48, kKeys = 256;
constexpr int64_t kPitch = kKeys + 16;  // of a row of weights: a power of two would put rows on the same cache sets
constexpr int64_t kStretch = 512;       // queries at least: copying the keys again then costs a hundredth

template <class A>
class Kernel {
    static constexpr int L = kLanes<A>, kWide = kCols<A>;
    static_assert(kQueries % kRows == 0 && kKeys % kWide == 0, "blocks of scores consist of blocks of registers");

    const FullAttention& call;
    int64_t stretch, stretches, padded, value_panels, keys;

    struct Scratch {
        A *key, *value;            // [keys / kWide, D, kWide] and [value_panels, keys, kWide]
        A *query, *rows;           // [kQueries, padded], [kWide, padded]
        A *scores, *weights;       // [kKeys / kWide, kQueries, kWide] and [kQueries, kPitch]
        A *out, *highest, *total;  // [value_panels, kQueries, kWide], [kQueries], [kQueries]

        Scratch(const Kernel& a, Arena& arena) {
            key = arena.take<A>(a.keys * a.padded);
            value = arena.take<A>(a.value_panels * a.keys * kWide);
            query = arena.take<A>(kQueries * a.padded);
            rows = arena.take<A>(kWide * a.padded);
            scores = arena.take<A>(kQueries * kKeys);
            weights = arena.take<A>(kQueries * kPitch);
            out = arena.take<A>(a.value_panels * kQueries * kWide);
            highest = arena.take<A>(kQueries);
            total = arena.take<A>(kQueries);
        }
    };

  public:
    explicit Kernel(const FullAttention& c) : call(c) {
        const int64_t wanted = ceil_div(int64_t(4) * call.num_threads, max<int64_t>(1, call.B * call.H));
        stretches = max<int64_t>(1, min(wanted, call.L / kStretch));
        stretch = round_up(ceil_div(call.L, stretches), kQueries);
        stretches = ceil_div(call.L, stretch);
        padded = round_up(call.D, kWide), value_panels = padded / kWide;
        keys = round_up(call.S, kKeys);
    }

    void run() {
        Arena count;
        Scratch(*this, count);
        parallel_for(call.B * call.H * stretches, 1, call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         const Scratch scratch(*this, arena);
                         for (int64_t i = first; i < last; ++i) task(i, scratch);
                     });
    }

  private:
    // `count` rows of D numbers, zero from there to `padded`.
    void fetch(const void* from, int64_t offset, int64_t stride, int64_t count, A* to) const {
        for (int64_t r = 0; r < count; ++r) {
            read_row(call.dtype, from, offset + r * stride, call.D, to + r * padded);
            std::fill(to + r * padded + call.D, to + (r + 1) * padded, A(0));
        }
    }

    void lay_out(int64_t b, int64_t h, const Scratch& s) const {
        const auto at = [&](const TensorView& x, int64_t j) {
            return b * x.stride[0] + j * x.stride[1] + h * x.stride[2];
        };
        // Invariant: the keys and values before j are laid out in panels.
        for (int64_t j = 0; j < call.S; j += kWide) {
            const int64_t count = min<int64_t>(kWide, call.S - j);
            fetch(call.key.data, at(call.key, j), call.key.stride[1], count, s.rows);
            transpose_rows<A>({s.rows, padded}, count, padded, s.key + j * padded, kWide);
            fetch(call.value.data, at(call.value, j), call.value.stride[1], count, s.rows);
            for (int64_t p = 0; p < value_panels; ++p)
                for (int64_t r = 0; r < count; ++r)
                    std::copy_n(s.rows + r * padded + p * kWide, kWide, s.value + (p * keys + j + r) * kWide);
        }
    }

    void task(int64_t index, const Scratch& s) const {
        const int64_t h = index / stretches % call.H, b = index / stretches / call.H;
        const int64_t begin = index % stretches * stretch, end = min(begin + stretch, call.L);
        lay_out(b, h, s);
        for (int64_t q = begin; q < end; q += kQueries) block(b, h, q, min(kQueries, end - q), s);
    }

    void block(int64_t b, int64_t h, int64_t q, int64_t rows, const Scratch& s) const {
        const int64_t *stride = call.query.stride, from = b * stride[0] + q * stride[1] + h * stride[2];
        // kRows adjacent queries, channel after channel, so that a product reads memory in order.
        for (int64_t r = 0; r < round_up(rows, int64_t(kRows)); ++r) {
            if (r < rows) read_row(call.dtype, call.query.data, from + r * stride[1], call.D, s.rows);
            A* const to = s.query + r / kRows * kRows * padded + r % kRows;
            for (int64_t c = 0; c < call.D; ++c) to[c * kRows] = s.rows[c] * A(call.scale);
        }
        std::fill_n(s.out, value_panels * kQueries * kWide, A(0));
        // Finite, so that the first block never computes -inf - -inf where it sees only -inf.
        std::fill_n(s.highest, rows, std::numeric_limits<A>::lowest());
        std::fill_n(s.total, rows, A(0));
        // Invariant: over the keys before j, highest is the maximum of a row's scores, total the sum of exp(score - highest), and
        // out that of exp(score - highest) * value.
        for (int64_t j = 0; j < call.S; j += kKeys) {
            const int64_t count = min(kKeys, call.S - j);
            for (int64_t p = 0; p < ceil_div(count, int64_t(kWide)); ++p)
                for (int64_t r = 0; r < rows; r += kRows)
                    product_block<A, kRows, true>(s.query + r * padded, kRows, s.key + j * padded + p * kWide * padded,
                                                  call.D, s.scores + (p * kQueries + r) * kWide, false);
            for (int64_t r = 0; r < rows; ++r) weigh(r, count, s);
            product<A, false>(rows, count, value_panels, s.weights, kPitch, s.value + j * kWide, keys * kWide, s.out,
                              kQueries * kWide, true);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = (b * call.L + q + r) * call.H + h;
            const A inverse = 1 / s.total[r];
            for (int64_t p = 0; p < value_panels; ++p)
                for (int64_t c = 0; c < kWide; c += L)
                    store(s.rows + p * kWide + c, load(s.out + (p * kQueries + r) * kWide + c) * inverse);
            write_row(call.dtype, s.rows, call.out, row * call.D, call.D);
            static_cast<A*>(call.lse)[row] = s.highest[r] + std::log(s.total[r]);
        }
    }

    // Scores of row r -> weights exp(score - highest so far); total and result are scaled to the new maximum.
    void weigh(int64_t r, int64_t count, const Scratch& s) const {
        const A* const scores = s.scores + r * kWide;
        A* const weights = s.weights + r * kPitch;
        if (count % kWide) {
            A* const tail = s.scores + (count / kWide * kQueries + r) * kWide;
            std::fill(tail + count % kWide, tail + kWide, -std::numeric_limits<A>::infinity());
        }
        const int64_t panels = ceil_div(count, int64_t(kWide));
        Vec<A> low = broadcast(s.highest[r]), high = low;
        for (int64_t p = 0; p < panels; ++p) {
            low = Maximum{}(low, load(scores + p * kQueries * kWide));
            high = Maximum{}(high, load(scores + p * kQueries * kWide + L));
        }
        const A highest = detail::fold<A, L / 2>(Maximum{}(low, high), Maximum{})[0];
        low = high = Vec<A>{};
        for (int64_t p = 0; p < panels; ++p) {
            const Vec<A> a = exp<A>(load(scores + p * kQueries * kWide) - highest);
            const Vec<A> b = exp<A>(load(scores + p * kQueries * kWide + L) - highest);
            store(weights + p * kWide, a), store(weights + p * kWide + L, b);
            low += a, high += b;
        }
        const A sum = detail::fold<A, L / 2>(low + high, Sum{})[0];
        if (highest != s.highest[r]) {
            const A decay = std::exp(s.highest[r] - highest);
            s.highest[r] = highest, s.total[r] *= decay;
            for (int64_t p = 0; p < value_panels; ++p)
                for (int64_t c = 0; c < kWide; c += L) {
                    A* const out = s.out + (p * kQueries + r) * kWide + c;
                    store(out, load(out) * decay);
                }
        }
        s.total[r] += sum;
    }
};

}  // namespace

void forward(const FullAttention& call) {
    if (call.dtype == DType::kFloat64) return Kernel<double>(call).run();
    Kernel<float>(call).run();
}

}  // namespace tritonkern::TRITONKERN_ISA::full_attention
