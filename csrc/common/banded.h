// Products with a banded matrix, the matrix that windowed attention makes: query i has entries for the `window` keys from
// i - left on. It is stored by diagonals: weights[o * pitch + i] belongs to query i and key i - left + o.
//
// An entry outside the band is never multiplied, not even by zero: 0 * NaN would carry a broken frame out of its window.
#pragma once

#include "common/strided.h"

namespace tritonkern::TRITONKERN_ISA {

// Vectors of channels whose sums stay in registers; x86 has 32 registers from AVX-512 on, aarch64 always.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif
// Rows that share the loads of a product with a band, by vectors of channels: 16 registers hold the sums of three by four,
// three weights and what they are multiplied with, but without a fused multiplication the product takes one more.
#if defined(__FMA__) && !defined(__AVX512F__)
constexpr int kBlock = 3, kBlockColumns = 4;
#else
constexpr int kBlock = 4, kBlockColumns = kColumns;
#endif
// Diagonals whose dot products are summed at once: 16 registers hold a window of 13 and the queries.
constexpr int kDiagonals = 13;

// use(first, N) for tiles of N that cover begin..end-1, where N is known to the compiler: as many large tiles as fit, and the
// rest in one.
template <int N, class Use>
TRITONKERN_INLINE void for_tiles(int64_t begin, int64_t end, const Use& use) {
    for (; begin + N <= end; begin += N) use(begin, std::integral_constant<int, N>{});
    if constexpr (N > 1) for_tiles<N - 1>(begin, end, use);
}

// dots[o * pitch] = x . y[:, o] for a vector of queries, lane by lane, and all diagonals o. Both are columns: x[d * lanes]
// and y[d * stride + o]; `dim` is even.
template <class A>
TRITONKERN_INLINE void band_dots(const A* x, const A* y, int64_t stride, int64_t dim, int64_t window, A* dots,
                                 int64_t pitch) {
    // Long sums are made of shorter ones, so that rounding errors grow with the square root of `part` rather than of `dim`.
    constexpr int64_t part = 64;
    for_tiles<kDiagonals>(0, window, [&](int64_t o, auto tile) __attribute__((always_inline)) {
        constexpr int diagonals = tile;
        for (int64_t begin = 0; begin < dim; begin += part) {
            Vec<A> sum[diagonals] = {};
            for (int64_t d = begin; d < min(begin + part, dim); d += 2) {
                for (const int64_t channel : {d, d + 1}) {
                    const Vec<A> column = load(x + channel * kLanes<A>);
                    TRITONKERN_UNROLL
                    for (int i = 0; i < diagonals; ++i) sum[i] += column * load(y + channel * stride + o + i);
                }
            }
            TRITONKERN_UNROLL
            for (int i = 0; i < diagonals; ++i) {
                A* target = dots + (o + i) * pitch;
                store(target, begin ? load(target) + sum[i] : sum[i]);
            }
        }
    });
}

// What a block of kBlock rows sees: row r the entries r..r+window-1, counted from `first`, of which begin..end-1 exist.
// Rows are queries and entries keys, or the other way round.
struct Band {
    int64_t first, window, begin, end;

    Band(int64_t first, int64_t window, int64_t count)
        : first(first), window(window), begin(max<int64_t>(-first, 0)), end(min(count - first, window + kBlock - 1)) {}
};

// The weight of row r and entry e is data[r * row + e * entry].
template <class A>
struct Diagonals {
    const A* data;
    int64_t row, entry;
};

namespace detail {

template <class A, int N>
TRITONKERN_INLINE void gather_tile(const Band& band, Diagonals<A> weights, Rows<A> x, A* const (&out)[kBlock],
                                   int64_t d) {
    Vec<A> sum[kBlock][N] = {};
    const auto add = [&](int64_t entry, const auto& sees) __attribute__((always_inline)) {
        const A *row = x[band.first + entry] + d, *weight = weights.data + entry * weights.entry;
        Vec<A> factor[kBlock];
        TRITONKERN_UNROLL
        for (int r = 0; r < kBlock; ++r)
            if (sees(r)) factor[r] = broadcast(weight[r * weights.row]);
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) {
            const Vec<A> part = load(row + v * kLanes<A>);
            TRITONKERN_UNROLL
            for (int r = 0; r < kBlock; ++r)
                if (sees(r)) sum[r][v] += factor[r] * part;
        }
    };
    const auto exists = [&](int64_t entry) { return band.begin <= entry && entry < band.end; };
    TRITONKERN_UNROLL
    for (int e = 0; e < kBlock - 1; ++e)
        if (exists(e)) add(e, [&](int r) { return r <= e && e - r < band.window; });
    const int64_t shared_end = min(band.window, band.end);
    for (int64_t e = max<int64_t>(band.begin, kBlock - 1); e < shared_end; ++e) add(e, [](int) { return true; });
    TRITONKERN_UNROLL
    for (int beyond = 0; beyond < kBlock - 1; ++beyond) {
        const int64_t e = band.window + beyond;
        if (e >= kBlock - 1 && exists(e)) add(e, [&](int r) { return r > beyond; });
    }
    TRITONKERN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) store(out[r] + d + v * kLanes<A>, sum[r][v]);
    }
}

}  // namespace detail

// out[r] = sum over the entries that row r sees of their weights times x[entry], `dim` channels (whole vectors).
template <class A>
void band_gather(const Band& band, Diagonals<A> weights, Rows<A> x, A* const (&out)[kBlock], int64_t dim) {
    for_tiles<kBlockColumns>(0, dim / kLanes<A>, [&](int64_t column, auto tile) __attribute__((always_inline)) {
        detail::gather_tile<A, tile>(band, weights, x, out, column * kLanes<A>);
    });
}

}  // namespace tritonkern::TRITONKERN_ISA
