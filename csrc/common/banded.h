// Products with a banded matrix, the matrix that windowed attention makes: row i (a query) has entries only for the
// keys of its window. All of them work on blocks of kBlock consecutive rows, whose joint band is hardly wider than one
// window.
//
// An entry outside the band is never multiplied, not even by zero: 0 * NaN would carry a broken frame out of its
// window.
#pragma once

#include "common/strided.h"

namespace tritonkern::TRITONKERN_ISA {

constexpr int kBlock = 4;
// Vectors of channels kept in registers for each row of a block; x86 has 32 registers from AVX-512 on, aarch64 always.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

// The band of one block. Keys are counted from the earliest one that any row sees; row r sees keys low[r]..high[r].
struct Band {
    int64_t first, keys;  // the earliest key, counted from `origin`, and the number of keys
    int64_t low[kBlock], high[kBlock];
    int64_t shared_begin, shared_end;  // the keys that all rows see

    // Rows are queries start..start+rows-1 of a sequence of T frames; the rows missing from a last block see nothing.
    Band(int64_t start, int64_t rows, int64_t T, int64_t left, int64_t right, int64_t origin) {
        first = max<int64_t>(start - left, 0);
        keys = min(start + rows - 1 + right, T - 1) - first + 1;
        shared_begin = 0, shared_end = keys;
        for (int64_t r = 0; r < kBlock; ++r) {
            low[r] = r < rows ? max<int64_t>(start + r - left, 0) - first : keys;
            high[r] = r < rows ? min(start + r + right, T - 1) - first : -1;
            shared_begin = max(shared_begin, low[r]);
            shared_end = min(shared_end, high[r] + 1);
        }
        shared_end = max(shared_begin, shared_end);
        first -= origin;
    }

    // The keys that row r sees besides the shared ones, restricted to begin..end-1.
    template <class Use>
    TRITONKERN_INLINE void for_other_keys(int r, int64_t begin, int64_t end, const Use& use) const {
        for (int64_t key = max(low[r], begin); key < min(min(shared_begin, high[r] + 1), end); ++key) use(key);
        for (int64_t key = max(max(low[r], shared_end), begin); key < min(high[r] + 1, end); ++key) use(key);
    }

    // All bits set in the lanes of the keys key..key+L-1 that row r sees.
    template <class A>
    TRITONKERN_INLINE IntVec<A> mask(int r, int64_t key) const {
        using Integer = typename VecTypes<A>::Integer;
        IntVec<A> lane;
        for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
        return (lane >= Integer(low[r] - key)) & (lane <= Integer(high[r] - key));
    }
};

namespace detail {

template <class A, int N>
TRITONKERN_INLINE void dot_tile(const A* const (&x)[kBlock], const A* y, int64_t stride, int64_t dim,
                                Vec<A> (&sum)[kBlock][N]) {
    // A fused multiply-add takes four cycles, and two may start in each: eight independent sums keep the unit busy.
    constexpr int chains = N == 1 ? 2 : 1;
    // Long sums are made of shorter ones, so that rounding errors grow with the square root of `part` rather than of
    // `dim`.
    constexpr int64_t part = 64;
    TRITONKERN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) sum[r][v] = Vec<A>{};
    }
    for (int64_t begin = 0; begin < dim; begin += part) {
        Vec<A> partial[chains][kBlock][N] = {};
        for (int64_t d = begin; d < min(begin + part, dim); d += chains) {
            TRITONKERN_UNROLL
            for (int c = 0; c < chains; ++c) {
                TRITONKERN_UNROLL
                for (int v = 0; v < N; ++v) {
                    const Vec<A> column = load(y + (d + c) * stride + v * kLanes<A>);
                    TRITONKERN_UNROLL
                    for (int r = 0; r < kBlock; ++r) partial[c][r][v] += x[r][d + c] * column;
                }
            }
        }
        TRITONKERN_UNROLL
        for (int r = 0; r < kBlock; ++r) {
            TRITONKERN_UNROLL
            for (int v = 0; v < N; ++v) {
                if constexpr (chains == 2) partial[0][r][v] += partial[1][r][v];
                sum[r][v] += partial[0][r][v];
            }
        }
    }
}

template <class A, int N>
TRITONKERN_INLINE void gather_tile(const Band& band, const A* weights, int64_t weight_stride, Rows<A> x,
                                   const A (&factor)[kBlock], A* const (&out)[kBlock], int64_t d) {
    x.data += band.first * x.stride + d;
    Vec<A> sum[kBlock][N] = {};
    TRITONKERN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
        band.for_other_keys(r, 0, band.keys, [&](int64_t key) __attribute__((always_inline)) {
            TRITONKERN_UNROLL
            for (int v = 0; v < N; ++v) sum[r][v] += weights[r * weight_stride + key] * load(x[key] + v * kLanes<A>);
        });
    }
    for (int64_t key = band.shared_begin; key < band.shared_end; ++key) {
        Vec<A> row[N];
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) row[v] = load(x[key] + v * kLanes<A>);
        TRITONKERN_UNROLL
        for (int r = 0; r < kBlock; ++r) {
            TRITONKERN_UNROLL
            for (int v = 0; v < N; ++v) sum[r][v] += weights[r * weight_stride + key] * row[v];
        }
    }
    TRITONKERN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) store(out[r] + d + v * kLanes<A>, sum[r][v] * factor[r]);
    }
}

// The band is a copy: stores through `out` cannot change it, so that its numbers stay in registers.
template <class A, int N>
TRITONKERN_INLINE void scatter_tile(const Band band, int64_t begin, int64_t end, const A* weights,
                                    int64_t weight_stride, const A* const (&x)[kBlock], A* out, int64_t out_stride,
                                    int64_t d) {
    Vec<A> row[kBlock][N];
    TRITONKERN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) row[r][v] = load(x[r] + d + v * kLanes<A>);
    }
    out += band.first * out_stride + d;
    TRITONKERN_UNROLL
    for (int r = 0; r < kBlock; ++r) {
        band.for_other_keys(r, begin, end, [&](int64_t key) __attribute__((always_inline)) {
            TRITONKERN_UNROLL
            for (int v = 0; v < N; ++v) {
                A* target = out + key * out_stride + v * kLanes<A>;
                store(target, load(target) + weights[r * weight_stride + key] * row[r][v]);
            }
        });
    }
    const int64_t shared_end = min(band.shared_end, end);
    for (int64_t key = max(band.shared_begin, begin); key < shared_end; ++key) {
        A* target = out + key * out_stride;
        Vec<A> sum[N];
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) sum[v] = load(target + v * kLanes<A>);
        TRITONKERN_UNROLL
        for (int r = 0; r < kBlock; ++r) {
            TRITONKERN_UNROLL
            for (int v = 0; v < N; ++v) sum[v] += weights[r * weight_stride + key] * row[r][v];
        }
        TRITONKERN_UNROLL
        for (int v = 0; v < N; ++v) store(target + v * kLanes<A>, sum[v]);
    }
}

}  // namespace detail

// use(key, tile) with tile[r][v] = x[r] . y[:, key + v * L ...] for all keys of the band, some lanes beyond included.
// `y` holds the keys as columns: y[d * stride + key].
template <class A, class Use>
TRITONKERN_INLINE void band_dots(const Band& band, const A* const (&x)[kBlock], const A* y, int64_t stride, int64_t dim,
                                 const Use& use) {
    constexpr int L = kLanes<A>;
    int64_t key = 0;
    for (; key + L < band.keys; key += 2 * L) {
        Vec<A> tile[kBlock][2];
        detail::dot_tile<A, 2>(x, y + key, stride, dim, tile);
        use(key, tile);
    }
    if (key < band.keys) {
        Vec<A> tile[kBlock][1];
        detail::dot_tile<A, 1>(x, y + key, stride, dim, tile);
        use(key, tile);
    }
}

// out[r] = factor[r] * sum over the keys that row r sees of weights[r][key] * x[key], `dim` channels (whole vectors).
template <class A, int N = kColumns>
inline void band_gather(const Band& band, const A* weights, int64_t weight_stride, Rows<A> x, const A (&factor)[kBlock],
                        A* const (&out)[kBlock], int64_t dim, int64_t d = 0) {
    constexpr int64_t width = N * kLanes<A>;
    for (; d + width <= dim; d += width) detail::gather_tile<A, N>(band, weights, weight_stride, x, factor, out, d);
    if constexpr (N > 1) {
        if (d < dim) band_gather<A, N - 1>(band, weights, weight_stride, x, factor, out, dim, d);
    }
}

// out[key] += sum over the rows r that see `key` of weights[r][key] * x[r], for begin <= key < end.
template <class A, int N = kColumns>
inline void band_scatter(const Band& band, int64_t begin, int64_t end, const A* weights, int64_t weight_stride,
                         const A* const (&x)[kBlock], A* out, int64_t out_stride, int64_t dim, int64_t d = 0) {
    constexpr int64_t width = N * kLanes<A>;
    for (; d + width <= dim; d += width)
        detail::scatter_tile<A, N>(band, begin, end, weights, weight_stride, x, out, out_stride, d);
    if constexpr (N > 1) {
        if (d < dim) band_scatter<A, N - 1>(band, begin, end, weights, weight_stride, x, out, out_stride, dim, d);
    }
}

}  // namespace tritonkern::TRITONKERN_ISA
