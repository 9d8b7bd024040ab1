// Products of one row with its columns. Columns are rows of a packed matrix, picked by a list of numbers.
#pragma once

#include "common/strided.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

// Lists of columns are padded to whole vectors.
template <class A>
constexpr int kListMultiple = kLanes<A>;

// Lane l of the result is the sum over all lanes of rows[l]; rows is overwritten.
template <class A, int S = kLanes<A> / 2>
TRITONKERN_INLINE Vec<A> sum_rows(Vec<A> (&rows)[kLanes<A>]) {
    TRITONKERN_UNROLL
    for (int k = 0; k < S; ++k)
        rows[k] = detail::shuffle<A, detail::KeepLow, S>(rows[k], rows[k + S]) +
                  detail::shuffle<A, detail::KeepHigh, S>(rows[k], rows[k + S]);
    if constexpr (S > 1) {
        return sum_rows<A, S / 2>(rows);
    } else {
        return rows[0];
    }
}

// Lane l is row . matrix[column[l]], for the first Count lanes; zero in the others.
template <class A, int Count>
TRITONKERN_INLINE Vec<A> dot_columns(const A* row, const A* matrix, int64_t stride, const int32_t* column) {
    constexpr int L = kLanes<A>;
    const A* x[Count];
    TRITONKERN_UNROLL
    for (int k = 0; k < Count; ++k) x[k] = matrix + column[k] * stride;
    Vec<A> sum[L] = {};
    for (int64_t d = 0; d < stride; d += L) {
        const Vec<A> y = load(row + d);
        TRITONKERN_UNROLL
        for (int k = 0; k < Count; ++k) sum[k] += y * load(x[k] + d);
    }
    return sum_rows<A>(sum);
}

template <class A, int N>
TRITONKERN_INLINE void gather_part(const A* weights, const int32_t* column, int64_t count, const A* matrix,
                                   int64_t stride, A factor, A* out) {
    constexpr int L = kLanes<A>;
    // A fused multiply-add takes four cycles, and two may start in each: eight independent sums keep the unit busy.
    constexpr int chains = N > 4 ? 1 : N > 2 ? 2 : 4;
    Vec<A> sum[chains][N] = {};
    int64_t j = 0;
    for (; j + chains <= count; j += chains) {
        TRITONKERN_UNROLL
        for (int c = 0; c < chains; ++c) {
            const A* x = matrix + column[j + c] * stride;
            TRITONKERN_UNROLL
            for (int v = 0; v < N; ++v) sum[c][v] += weights[j + c] * load(x + v * L);
        }
    }
    for (; j < count; ++j) {
        const A* x = matrix + column[j] * stride;
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) sum[0][v] += weights[j] * load(x + v * L);
    }
    TRITONKERN_UNROLL
    for (int v = 0; v < N; ++v) {
        TRITONKERN_UNROLL
        for (int c = 1; c < chains; ++c) sum[0][v] += sum[c][v];
        store(out + v * L, sum[0][v] * factor);
    }
}

template <class A, int N>
TRITONKERN_INLINE void scatter_part(const A* weights, const int32_t* column, int64_t count, const A* row, A* matrix,
                                    int64_t stride) {
    constexpr int L = kLanes<A>;
    Vec<A> x[N];
    TRITONKERN_UNROLL
    for (int v = 0; v < N; ++v) x[v] = load(row + v * L);
    for (int64_t j = 0; j < count; ++j) {
        A* target = matrix + column[j] * stride;
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) store(target + v * L, load(target + v * L) + weights[j] * x[v]);
    }
}

// use(j, products) with lane l of `products` = row . matrix[column[j + l]]; lanes from `count` on hold products with
// the columns that pad the list.
template <class A, class Use>
TRITONKERN_INLINE void dot_list(const A* row, const A* matrix, int64_t stride, const int32_t* column, int64_t count,
                                const Use& use) {
    constexpr int L = kLanes<A>;
    int64_t j = 0;
    for (; j + L / 2 < count; j += L) use(j, dot_columns<A, L>(row, matrix, stride, column + j));
    if (j < count) use(j, dot_columns<A, L / 2>(row, matrix, stride, column + j));
}

// out = factor * sum of weights[j] * matrix[column[j]]
template <class A, int N = 8>
inline void gather_list(const A* weights, const int32_t* column, int64_t count, const A* matrix, int64_t stride,
                        A factor, A* out, int64_t d = 0) {
    for (; d + N * kLanes<A> <= stride; d += N * kLanes<A>)
        gather_part<A, N>(weights, column, count, matrix + d, stride, factor, out + d);
    if constexpr (N > 1) {
        if (d < stride) gather_list<A, N / 2>(weights, column, count, matrix, stride, factor, out, d);
    }
}

// matrix[column[j]] += weights[j] * row
template <class A, int N = 8>
inline void scatter_list(const A* weights, const int32_t* column, int64_t count, const A* row, A* matrix,
                         int64_t stride, int64_t d = 0) {
    for (; d + N * kLanes<A> <= stride; d += N * kLanes<A>)
        scatter_part<A, N>(weights, column, count, row + d, matrix + d, stride);
    if constexpr (N > 1) {
        if (d < stride) scatter_list<A, N / 2>(weights, column, count, row, matrix, stride, d);
    }
}

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
