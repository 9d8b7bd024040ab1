// The matrix products of the linear layer after the correlation: out[m, n] (+)= sum over k of left[m, k] right[k, n].
//
// A task is a tile of out. It copies its part of `right` into panels, kDepth rows at a time, and multiplies it with rows of
// `left` in place. The sums of kDepth products are added in order, whatever the number of threads, which PyTorch's products do
// not promise.
#pragma once

#include "common/product.h"
#include "common/strided.h"
#include "local_correlation/call.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

template <class A>
class Product {
    static constexpr int64_t kTileRows = 192, kTileColumns = 96, kDepth = 192;
    static constexpr int64_t W = kCols<A>, L = kLanes<A>;  // columns of a panel and of a vector

    const LocalCorrelationProduct& call;
    const A *const left, *const right;
    A* const out;

    struct Scratch {
        A *panels, *sums;

        explicit Scratch(Arena& arena)
            : panels(arena.take<A>(kDepth * kTileColumns)), sums(arena.take<A>(kTileRows * kTileColumns)) {}
    };

  public:
    explicit Product(const LocalCorrelationProduct& call)
        : call(call),
          left(static_cast<const A*>(call.left.data)),
          right(static_cast<const A*>(call.right.data)),
          out(static_cast<A*>(call.out.data)) {}

    void run() const {
        static_assert(kTileColumns % W == 0);
        Arena count;
        Scratch{count};
        const int64_t row_tiles = ceil_div(call.M, kTileRows), column_tiles = ceil_div(call.N, kTileColumns);
        parallel_for(row_tiles * column_tiles, 1, call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         const Scratch scratch(arena);
                         for (int64_t task = first; task < last; ++task) {
                             // Tiles of rows are equally high, so that the last one is not a few rows alone.
                             const int64_t tile = task / column_tiles, column = task % column_tiles * kTileColumns;
                             const int64_t row = call.M * tile / row_tiles, end = call.M * (tile + 1) / row_tiles;
                             compute(row, end - row, column, min(kTileColumns, call.N - column), scratch);
                         }
                     });
    }

  private:
    void compute(int64_t row, int64_t rows, int64_t column, int64_t columns, const Scratch& scratch) const {
        const int64_t panels = ceil_div(columns, W);
        // `sums` holds the products of the rows of `right` before k. Without any it is zero.
        for (int64_t k = 0; k < max<int64_t>(call.K, 1); k += kDepth) {
            const int64_t depth = min(kDepth, call.K - k);
            for (int64_t p = 0; p < panels; ++p)
                pack(k, depth, column + p * W, min(W, columns - p * W), scratch.panels + p * depth * W);
            const A* const from = left + row * call.left.stride[0] + k * call.left.stride[1];
            const auto multiply = [&](auto transposed, int64_t stride) {
                product<A, transposed>(rows, depth, panels, from, stride, scratch.panels, depth * W, scratch.sums,
                                       rows * W, k > 0);
            };
            if (call.left.stride[1] == 1)
                multiply(std::false_type{}, call.left.stride[0]);
            else
                multiply(std::true_type{}, call.left.stride[1]);
        }
        for (int64_t p = 0; p < panels; ++p) {
            for (int64_t r = 0; r < rows; ++r) {
                const A* const sums = scratch.sums + (p * rows + r) * W;
                A* const to = out + (row + r) * call.N + column + p * W;
                for (int64_t i = 0; i < min(W, columns - p * W); ++i) to[i] = call.add ? to[i] + sums[i] : sums[i];
            }
        }
    }

    // panel[k * W + n] = right[k, n] for `depth` rows and W columns, zero from `columns` on.
    void pack(int64_t k, int64_t depth, int64_t n, int64_t columns, A* panel) const {
        const int64_t down = call.right.stride[0], across = call.right.stride[1];
        const A* const from = right + k * down + n * across;
        int64_t i = 0;
        if (columns == W && across == 1) {
            for (; i < depth; ++i)
                for (int64_t j = 0; j < W; j += L) store(panel + i * W + j, load(from + i * down + j));
        } else if (columns == W && down == 1) {
            for (; i + L <= depth; i += L) {
                for (int64_t j = 0; j < W; j += L) {
                    Vec<A> tile[L];
                    for (int l = 0; l < L; ++l) tile[l] = load(from + i + (j + l) * across);
                    transpose<A>(tile);
                    for (int l = 0; l < L; ++l) store(panel + (i + l) * W + j, tile[l]);
                }
            }
        }
        for (; i < depth; ++i)
            for (int64_t j = 0; j < W; ++j) panel[i * W + j] = j < columns ? from[i * down + j * across] : A(0);
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
