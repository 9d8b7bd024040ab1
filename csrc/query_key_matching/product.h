// Matrix products from registers, as common/product.h, of rows that stay where they are: all three matrices have a stride.
#pragma once

#include "common/product.h"

namespace tritonkern::TRITONKERN_ISA::query_key_matching {

// A matrix by rows, `stride` numbers apart.
template <class A>
struct Matrix {
    A* data;
    int64_t stride;

    A* operator[](int64_t row) const { return data + row * stride; }
};

// out (+)= left right for R rows and kCols columns; left [R, K], or if `kTransposed` [K, R].
template <class A, int R, bool kTransposed>
inline void multiply_block(Matrix<const A> left, Matrix<const A> right, int64_t K, Matrix<A> out, bool add) {
    constexpr int L = kLanes<A>;
    Vec<A> low[R], high[R];
    TRITONKERN_UNROLL
    for (int r = 0; r < R; ++r) low[r] = high[r] = Vec<A>{};
    for (int64_t k = 0; k < K; ++k) {
        const Vec<A> right_low = load(right[k]), right_high = load(right[k] + L);
        TRITONKERN_UNROLL
        for (int r = 0; r < R; ++r) {
            const Vec<A> x = broadcast(kTransposed ? left[k][r] : left[r][k]);
            low[r] += x * right_low;
            high[r] += x * right_high;
        }
    }
    // Added last: a sum of short sums rounds less than a long one.
    TRITONKERN_UNROLL
    for (int r = 0; r < R && add; ++r) low[r] += load(out[r]), high[r] += load(out[r] + L);
    TRITONKERN_UNROLL
    for (int r = 0; r < R; ++r) store(out[r], low[r]), store(out[r] + L, high[r]);
}

template <class A, bool kTransposed, int R = kRows - 1>
void multiply_rest(int64_t rows, Matrix<const A> left, Matrix<const A> right, int64_t K, Matrix<A> out, bool add) {
    if constexpr (R > 0) {
        if (rows == R) return multiply_block<A, R, kTransposed>(left, right, K, out, add);
        multiply_rest<A, kTransposed, R - 1>(rows, left, right, K, out, add);
    }
}

// out [rows, columns] (+)= left right, where `columns` is a multiple of kCols.
template <class A, bool kTransposed = false>
void multiply(int64_t rows, int64_t columns, int64_t K, Matrix<const A> left, Matrix<const A> right, Matrix<A> out,
              bool add) {
    for (int64_t r = 0; r < rows; r += kRows) {
        const Matrix<const A> a{kTransposed ? left.data + r : left[r], left.stride};
        for (int64_t c = 0; c < columns; c += kCols<A>) {
            const Matrix<const A> b{right.data + c, right.stride};
            const Matrix<A> to{out[r] + c, out.stride};
            if (r + kRows <= rows) {
                multiply_block<A, kRows, kTransposed>(a, b, K, to, add);
            } else {
                multiply_rest<A, kTransposed>(rows - r, a, b, K, to, add);
            }
        }
    }
}

}  // namespace tritonkern::TRITONKERN_ISA::query_key_matching
