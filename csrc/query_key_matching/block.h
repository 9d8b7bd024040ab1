// Softmax weights of a block of rows ("own", one in each lane) over other rows:
//
//   w[j, i] = exp(scale <own_i, other_j>) / sum_j exp(scale <own_i, other_j>)
//
//              own ->
//   other  | 6 x 16 sums |      Lanes are own rows, so that the maximum, the sum and all weights of a row stay in one lane. Other
//     |    | 6 x 16 sums |      rows are read in place, one number at a time. A chunk of kChunk of them is multiplied, its maximum
//     v    |     ...     |      found and its exponentials taken while it is in the first-level cache.
#pragma once

#include <algorithm>
#include <limits>

#include "common/rows.h"
#include "common/strided.h"
#include "query_key_matching/product.h"

namespace tritonkern::TRITONKERN_ISA::query_key_matching {

constexpr int64_t kOwn = 32;    // own rows of a block
constexpr int64_t kChunk = 48;  // other rows at a time

// The rows of one head: row r starts at the element offset + r * stride.
struct Head {
    DType dtype;
    const void* data;
    int64_t offset, stride, dim;
};

template <class A>
class Block {
    static constexpr int L = kLanes<A>, V = kOwn / L;
    static_assert(kOwn % kCols<A> == 0 && kChunk % kRows == 0, "blocks of weights consist of blocks of registers");

    const int64_t padded;
    A *panel, *converted, *decay_;  // [padded, kOwn], [kChunk, padded], [kOwn]

  public:
    Matrix<A> own;  // [kOwn, padded], times scale
    A *top, *total;

    Block(int64_t dim, Arena& arena) : padded(round_up(dim, kCols<A>)) {
        panel = arena.take<A>(padded * kOwn);
        converted = arena.take<A>(kChunk * padded);
        decay_ = arena.take<A>(kOwn);
        own = {arena.take<A>(kOwn * padded), padded};
        top = arena.take<A>(kOwn);
        total = arena.take<A>(kOwn);
    }

    const A* decay() const { return decay_; }

    // Takes `count` own rows, row i of which is row number(i) of the head. The others are 0.
    template <class Number>
    void begin(const Head& head, double scale, int64_t count, const Number& number) {
        for (int64_t i = 0; i < kOwn; ++i) {
            std::fill_n(own[i], padded, A(0));
            if (i >= count) continue;
            read_row(head.dtype, head.data, head.offset + number(i) * head.stride, head.dim, own[i]);
            for (int64_t c = 0; c < head.dim; ++c) own[i][c] *= A(scale);
        }
        transpose_rows<A>({own.data, padded}, kOwn, padded, panel, kOwn);
        // Finite, so that no exponent is -inf - -inf where a row sees only -inf.
        std::fill_n(top, kOwn, std::numeric_limits<A>::lowest());
        std::fill_n(total, kOwn, A(0));
    }

    // Other rows [first, first + count) for a product: in place, or converted. `whole`: rows may be read up to `padded`.
    Matrix<const A> others(const Head& head, int64_t first, int64_t count, bool whole) const {
        const int64_t offset = head.offset + first * head.stride;
        const bool same = head.dtype == (sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32);
        if (same && (!whole || head.dim == padded)) return {static_cast<const A*>(head.data) + offset, head.stride};
        for (int64_t r = 0; r < count; ++r) {
            read_row(head.dtype, head.data, offset + r * head.stride, head.dim, converted + r * padded);
            std::fill(converted + r * padded + head.dim, converted + (r + 1) * padded, A(0));
        }
        return {converted, padded};
    }

    // strip[j, i] = scale <own_i, other_j> for at most kChunk other rows.
    void multiply_own(Matrix<const A> others, int64_t dim, int64_t count, A* strip) const {
        multiply<A>(count, kOwn, dim, others, {panel, kOwn}, {strip, kOwn}, false);
    }

    // strip: logits -> exp(logit - top), with `top` the largest logit of all chunks up to this one; `total` is their sum, to which
    // what came before is scaled by `decay`.
    void exponentials(A* strip, int64_t count) const {
        Vec<A> highest[V], sum[V];
        TRITONKERN_UNROLL
        for (int v = 0; v < V; ++v) highest[v] = load(top + v * L), sum[v] = Vec<A>{};
        for (int64_t r = 0; r < count; ++r) {
            TRITONKERN_UNROLL
            for (int v = 0; v < V; ++v) highest[v] = Maximum{}(highest[v], load(strip + r * kOwn + v * L));
        }
        for (int64_t r = 0; r < count; ++r) {
            TRITONKERN_UNROLL
            for (int v = 0; v < V; ++v) {
                const Vec<A> e = exp<A>(load(strip + r * kOwn + v * L) - highest[v]);
                store(strip + r * kOwn + v * L, e);
                sum[v] += e;
            }
        }
        for (int v = 0; v < V; ++v) {
            const Vec<A> scaled = exp<A>(load(top + v * L) - highest[v]);
            store(decay_ + v * L, scaled);
            store(total + v * L, load(total + v * L) * scaled + sum[v]);
            store(top + v * L, highest[v]);
        }
    }

    // All `count` other rows: tile [count, kOwn] becomes exp(logit - top of its chunk), and factor [chunks, kOwn] what this is to
    // be multiplied with for weights times `share`. excluded(j): rows that take no part.
    template <class Excluded>
    void weigh(const Head& head, int64_t count, A share, A* tile, A* factor, const Excluded& excluded) const {
        for (int64_t j = 0; j < count; j += kChunk) {
            const int64_t rows = min(kChunk, count - j);
            A* const strip = tile + j * kOwn;
            multiply_own(others(head, j, rows, false), head.dim, rows, strip);
            for (int64_t r = 0; r < rows; ++r)
                if (excluded(j + r)) std::fill_n(strip + r * kOwn, kOwn, -std::numeric_limits<A>::infinity());
            exponentials(strip, rows);
            std::copy_n(top, kOwn, factor + j / kChunk * kOwn);
        }
        for (int64_t j = 0; j < ceil_div(count, kChunk); ++j)
            for (int64_t i = 0; i < kOwn; i += L) {
                A* const f = factor + j * kOwn + i;
                store(f, exp<A>(load(f) - load(top + i)) * (share / load(total + i)));
            }
    }
};

struct None {
    bool operator()(int64_t) const { return false; }
};

// sums[r] += tile[row(r)] * its factor, for rows of kOwn numbers.
template <class A, class Row>
TRITONKERN_INLINE void add_weights(const A* tile, const A* factor, int64_t count, const Row& row, A* sums) {
    constexpr int L = kLanes<A>;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t from = row(r);
        const A *weights = tile + from * kOwn, *f = factor + from / kChunk * kOwn;
        TRITONKERN_UNROLL
        for (int i = 0; i < kOwn; i += L)
            store(sums + r * kOwn + i, load(sums + r * kOwn + i) + load(weights + i) * load(f + i));
    }
}

}  // namespace tritonkern::TRITONKERN_ISA::query_key_matching
