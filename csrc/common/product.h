// Matrix products from registers: blocks of kRows x kCols results, whose columns are vectors.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace tritonkern::TRITONKERN_ISA {

// As many results as registers hold in addition to two vectors of the right factor and one element of the left.
constexpr int kRows = TRITONKERN_VECTOR_BYTES == 64 ? 12 : 6;
template <class A>
constexpr int kCols = 2 * kLanes<A>;

// out[r, :] (+)= sum_k left[r, k] right[k, :] for R rows. `right` and `out` are panels: kCols columns, row after row.
// left[r, k] is at r * stride + k, or if `kTransposed` at k * stride + r.
template <class A, int R, bool kTransposed>
inline void product_block(const A* left, int64_t stride, const A* right, int64_t K, A* out, bool add) {
    constexpr int L = kLanes<A>;
    Vec<A> low[R], high[R];
    TRITONKERN_UNROLL
    for (int r = 0; r < R; ++r) {
        low[r] = high[r] = Vec<A>{};
    }
    for (int64_t k = 0; k < K; ++k) {
        const Vec<A> right_low = load(right + k * kCols<A>), right_high = load(right + k * kCols<A> + L);
        TRITONKERN_UNROLL
        for (int r = 0; r < R; ++r) {
            const Vec<A> x = broadcast(kTransposed ? left[k * stride + r] : left[r * stride + k]);
            low[r] += x * right_low;
            high[r] += x * right_high;
        }
    }
    // Added last: a sum of short sums rounds less than a long one.
    TRITONKERN_UNROLL
    for (int r = 0; r < R && add; ++r) {
        low[r] += load(out + r * kCols<A>);
        high[r] += load(out + r * kCols<A> + L);
    }
    TRITONKERN_UNROLL
    for (int r = 0; r < R; ++r) {
        store(out + r * kCols<A>, low[r]);
        store(out + r * kCols<A> + L, high[r]);
    }
}

template <class A, bool kTransposed, int R = kRows>
void product_rest(int64_t rows, const A* left, int64_t stride, const A* right, int64_t K, A* out, bool add) {
    if constexpr (R > 0) {
        if (rows == R) return product_block<A, R, kTransposed>(left, stride, right, K, out, add);
        product_rest<A, kTransposed, R - 1>(rows, left, stride, right, K, out, add);
    }
}

// All rows and panels. Panels of `right` and `out` follow each other at the given distances.
template <class A, bool kTransposed>
void product(int64_t rows, int64_t K, int64_t panels, const A* left, int64_t stride, const A* right,
             int64_t right_panel, A* out, int64_t out_panel, bool add) {
    for (int64_t p = 0; p < panels; ++p) {
        const A* b = right + p * right_panel;
        A* c = out + p * out_panel;
        int64_t r = 0;
        for (; r + kRows <= rows; r += kRows) {
            const A* a = left + (kTransposed ? r : r * stride);
            product_block<A, kRows, kTransposed>(a, stride, b, K, c + r * kCols<A>, add);
        }
        product_rest<A, kTransposed, kRows - 1>(rows - r, left + (kTransposed ? r : r * stride), stride, b, K,
                                                c + r * kCols<A>, add);
    }
}

}  // namespace tritonkern::TRITONKERN_ISA
