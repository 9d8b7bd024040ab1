// Scores of a block of cells with panels of queries, and their statistics over the cells. Lanes are queries.
#pragma once

#include <limits>

#include "correlation_soft_argmax/cells.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {

// A panel is two vectors of queries: columns[channel * kPanel + query]. Its last one may be a single vector.
template <class A>
constexpr int kPanel = 2 * kLanes<A>;

// Cells whose sums with two vectors of queries stay in registers: 12 or 24 sums of 16 or 32 registers. With one vector, 12:
// two multiply-adds of four cycles start in each cycle.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileCells = 12;
#else
constexpr int kTileCells = 6;
#endif
constexpr int kNarrowTileCells = 12;
constexpr int kCellMultiple = 12;
constexpr int kMostCells = 48;

// Statistics of all cells so far, in the order of their numbers, for each query of a panel.
template <class A>
struct PanelStatistics {
    using Integer = typename VecTypes<A>::Integer;

    alignas(kCacheLine) A maximum[kPanel<A>], minimum[kPanel<A>];
    Integer best[kPanel<A>], worst[kPanel<A>];
    double total[kPanel<A>];

    void reset(int64_t first_cell) {
        constexpr A infinity = std::numeric_limits<A>::infinity();
        for (int i = 0; i < kPanel<A>; ++i) {
            maximum[i] = -infinity, minimum[i] = infinity, total[i] = 0;
            best[i] = worst[i] = Integer(first_cell);
        }
    }
};

// Whether x replaces the extremum: it is beyond it, or the first NaN.
struct Above {
    template <class V>
    TRITONKERN_INLINE auto operator()(V x, V extremum) const {
        return ~(x <= extremum) & (extremum == extremum);
    }
};
struct Below {
    template <class V>
    TRITONKERN_INLINE auto operator()(V x, V extremum) const {
        return ~(x >= extremum) & (extremum == extremum);
    }
};

namespace detail {

// scores[cell][query] (+)= sum over `depth` channels d of rows[cell][d] * panel[d][query]
template <class A, int Cells, int V>
inline void tile(const A* const* rows, const A* panel, int64_t depth, bool add, A* scores) {
    constexpr int L = kLanes<A>;
    Vec<A> sum[Cells][V];
    const A* x[Cells];
    TRITONKERN_UNROLL
    for (int i = 0; i < Cells; ++i) {
        x[i] = rows[i];
        TRITONKERN_UNROLL
        for (int v = 0; v < V; ++v) sum[i][v] = add ? load(scores + (i * V + v) * L) : Vec<A>{};
    }
    for (int64_t d = 0; d < depth; ++d) {
        Vec<A> y[V];
        TRITONKERN_UNROLL
        for (int v = 0; v < V; ++v) y[v] = load(panel + (d * V + v) * L);
        TRITONKERN_UNROLL
        for (int i = 0; i < Cells; ++i) {
            TRITONKERN_UNROLL
            for (int v = 0; v < V; ++v) sum[i][v] += x[i][d] * y[v];
        }
    }
    TRITONKERN_UNROLL
    for (int i = 0; i < Cells; ++i) {
        TRITONKERN_UNROLL
        for (int v = 0; v < V; ++v) store(scores + (i * V + v) * L, sum[i][v]);
    }
}

template <class A, int V>
inline void panel_statistics(const A* scores, int64_t count, const A* factors, int64_t first_cell,
                             PanelStatistics<A>& statistics) {
    constexpr int L = kLanes<A>;
    using Integer = typename VecTypes<A>::Integer;
    TRITONKERN_UNROLL
    for (int v = 0; v < V; ++v) {
        Vec<A> maximum = load(statistics.maximum + v * L), minimum = load(statistics.minimum + v * L), sum = {};
        IntVec<A> best = load(statistics.best + v * L), worst = load(statistics.worst + v * L);
        for (int64_t i = 0; i < count; ++i) {
            Vec<A> score = load(scores + (i * V + v) * L);
            if (factors) score = score * factors[i];
            const IntVec<A> cell = Integer(first_cell + i) - IntVec<A>{};
            const IntVec<A> above = Above{}(score, maximum), below = Below{}(score, minimum);
            maximum = above ? score : maximum, best = above ? cell : best;
            minimum = below ? score : minimum, worst = below ? cell : worst;
            sum += score;
        }
        store(statistics.maximum + v * L, maximum), store(statistics.minimum + v * L, minimum);
        store(statistics.best + v * L, best), store(statistics.worst + v * L, worst);
        for (int l = 0; l < L; ++l) statistics.total[v * L + l] += double(sum[l]);
    }
}

}  // namespace detail

// Adds `count` cells, numbered from `first_cell`, to the statistics of a panel of V vectors. `rows` has count rounded up
// to kCellMultiple entries, `scores` room for as many times the queries; factors[i] multiplies the scores of a cell, unless null.
// between_tiles() is called before each tile.
template <class A, int V, class BetweenTiles>
inline void update_panel(const A* const* rows, int64_t count, const A* factors, int64_t first_cell, const A* panel,
                         int64_t dim, A* scores, PanelStatistics<A>& statistics, const BetweenTiles& between_tiles) {
    // A part of a panel and of the rows of a tile (16 + 6 KiB in float32) share the first-level cache with the scores.
    constexpr int64_t deepest = 16384 / (kPanel<A> * int64_t(sizeof(A)));
    constexpr int cells = V == 2 ? kTileCells : kNarrowTileCells;
    const int64_t depth = ceil_div(dim, ceil_div(dim, deepest));
    for (int64_t d = 0; d < dim; d += depth) {
        for (int64_t i = 0; i < count; i += cells) {
            between_tiles();
            const A* x[cells];
            for (int k = 0; k < cells; ++k) x[k] = rows[i + k] + d;
            detail::tile<A, cells, V>(x, panel + d * V * kLanes<A>, min(depth, dim - d), d > 0,
                                      scores + i * V * kLanes<A>);
        }
    }
    detail::panel_statistics<A, V>(scores, count, factors, first_cell, statistics);
}

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
