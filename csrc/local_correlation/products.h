// Products of the cells of a lattice with supports, whose sums stay in registers. Rows of cells are read in place.
#pragma once

#include "common/banded.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

// Cells and vectors of supports of one tile of sums; the number of cells is always a multiple of 4.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileCells = 8;
#else
constexpr int kTileCells = 4;
#endif
constexpr int kTileVectors = 3;
// Rows of a tile of the products that add to memory; it has kColumns vectors of channels.
constexpr int kSums = 6;
// Channels per partial sum: sums of short sums have smaller rounding errors.
constexpr int64_t kDepth = 128;

namespace detail {

// values[cell * pitch + s] = rows[cell] . support[s] for Cells cells and V vectors of supports; panel[channel * V * lanes + s].
template <class A, int Cells, int V>
inline void tile(const A* const* rows, const A* panel, int64_t channels, A* values, int64_t pitch) {
    constexpr int L = kLanes<A>;
    for (int64_t first = 0; first < channels; first += kDepth) {
        Vec<A> sum[Cells][V] = {};
        const A* x[Cells];
        TRITONKERN_UNROLL
        for (int i = 0; i < Cells; ++i) x[i] = rows[i];
        const int64_t last = min(first + kDepth, channels);
        for (int64_t c = first; c < last; ++c) {
            Vec<A> y[V];
            TRITONKERN_UNROLL
            for (int v = 0; v < V; ++v) y[v] = load(panel + (c * V + v) * L);
            TRITONKERN_UNROLL
            for (int i = 0; i < Cells; ++i) {
                const Vec<A> value = broadcast(x[i][c]);
                TRITONKERN_UNROLL
                for (int v = 0; v < V; ++v) sum[i][v] += value * y[v];
            }
        }
        TRITONKERN_UNROLL
        for (int i = 0; i < Cells; ++i) {
            TRITONKERN_UNROLL
            for (int v = 0; v < V; ++v) {
                A* target = values + i * pitch + v * L;
                store(target, first ? load(target) + sum[i][v] : sum[i][v]);
            }
        }
    }
}

}  // namespace detail

// out[i] = rows[i] . y for four rows.
template <class A>
inline void four_dots(const A* const* rows, const A* y, int64_t channels, A* out) {
    Vec<A> sum[4] = {};
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) {
        const Vec<A> part = load(y + c);
        TRITONKERN_UNROLL
        for (int i = 0; i < 4; ++i) sum[i] += load(rows[i] + c) * part;
    }
    reduce<A>(sum, Sum{}, out);
    for (; c < channels; ++c)
        for (int i = 0; i < 4; ++i) out[i] += rows[i][c] * y[c];
}

// targets[i][c] += sum over s of weights[i][s] * rows[s * stride + c]. No two targets are the same.
template <class A>
inline void add_products(A* const* targets, const A* const* weights, int64_t count, const A* rows, int64_t stride,
                         int64_t S, int64_t channels) {
    const int64_t vectors = channels / kLanes<A>;
    for_tiles<kColumns>(0, vectors, [&](int64_t v, auto columns) __attribute__((always_inline)) {
        constexpr int V = columns;
        for_tiles<kSums>(0, count, [&](int64_t i, auto tile) __attribute__((always_inline)) {
            constexpr int n = tile;
            Vec<A> sum[n][V];
            TRITONKERN_UNROLL
            for (int k = 0; k < n; ++k) {
                TRITONKERN_UNROLL
                for (int j = 0; j < V; ++j) sum[k][j] = load(targets[i + k] + (v + j) * kLanes<A>);
            }
            for (int64_t s = 0; s < S; ++s) {
                Vec<A> row[V];
                TRITONKERN_UNROLL
                for (int j = 0; j < V; ++j) row[j] = load(rows + s * stride + (v + j) * kLanes<A>);
                TRITONKERN_UNROLL
                for (int k = 0; k < n; ++k) {
                    const Vec<A> weight = broadcast(weights[i + k][s]);
                    TRITONKERN_UNROLL
                    for (int j = 0; j < V; ++j) sum[k][j] += weight * row[j];
                }
            }
            TRITONKERN_UNROLL
            for (int k = 0; k < n; ++k) {
                TRITONKERN_UNROLL
                for (int j = 0; j < V; ++j) store(targets[i + k] + (v + j) * kLanes<A>, sum[k][j]);
            }
        });
    });
    for (int64_t c = vectors * kLanes<A>; c < channels; ++c)
        for (int64_t i = 0; i < count; ++i)
            for (int64_t s = 0; s < S; ++s) targets[i][c] += weights[i][s] * rows[s * stride + c];
}

// out[s * stride + c] += sum over cells of weights[cell][s] * rows[cell][c]; channels are whole vectors.
template <class A>
inline void add_transposed_products(const A* const* rows, const A* const* weights, int64_t count, int64_t S,
                                    int64_t channels, A* out, int64_t stride) {
    for_tiles<kColumns>(0, channels / kLanes<A>, [&](int64_t v, auto columns) __attribute__((always_inline)) {
        constexpr int V = columns;
        for_tiles<kSums>(0, S, [&](int64_t s, auto tile) __attribute__((always_inline)) {
            constexpr int n = tile;
            A* target = out + s * stride + v * kLanes<A>;
            Vec<A> sum[n][V];
            TRITONKERN_UNROLL
            for (int k = 0; k < n; ++k) {
                TRITONKERN_UNROLL
                for (int j = 0; j < V; ++j) sum[k][j] = load(target + k * stride + j * kLanes<A>);
            }
            for (int64_t i = 0; i < count; ++i) {
                const A *x = rows[i] + v * kLanes<A>, *weight = weights[i] + s;
                Vec<A> row[V];
                TRITONKERN_UNROLL
                for (int j = 0; j < V; ++j) row[j] = load(x + j * kLanes<A>);
                TRITONKERN_UNROLL
                for (int k = 0; k < n; ++k) {
                    TRITONKERN_UNROLL
                    for (int j = 0; j < V; ++j) sum[k][j] += weight[k] * row[j];
                }
            }
            TRITONKERN_UNROLL
            for (int k = 0; k < n; ++k) {
                TRITONKERN_UNROLL
                for (int j = 0; j < V; ++j) store(target + k * stride + j * kLanes<A>, sum[k][j]);
            }
        });
    });
}

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
