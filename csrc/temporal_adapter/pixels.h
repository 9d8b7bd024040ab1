// Pixels of strided images as vectors of channels, and the tiles that a convolution cuts an image into.
#pragma once

#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "temporal_adapter/call.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {

// The last channels, fewer than a vector holds; zeros beyond. Not inlined: the many places that load a pixel stay small.
template <class A, class S>
__attribute__((noinline)) Vec<A> load_last_channels(const S* p, int64_t count) {
    A lanes[kLanes<A>] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
}

template <class A, class S>
__attribute__((noinline)) void store_last_channels(S* p, Vec<A> v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow(v[i], &p[i]);
}

// `count` channels from p on (all kLanes if count is at least that), widened.
template <class A, class S>
TRITONKERN_INLINE Vec<A> load_channels(const S* p, int64_t count) {
    constexpr int L = kLanes<A>;
    if (__builtin_expect(count < L, 0)) return load_last_channels<A>(p, count);
    if constexpr (std::is_same_v<S, A>) {
        return load(p);
    } else if constexpr (L % 8 == 0) {
        A lanes[L];
        for (int i = 0; i < L; i += 8) widen8(p + i, lanes + i);
        return load(lanes);
    } else {
        return load_last_channels<A>(p, L);
    }
}

template <class A, class S>
TRITONKERN_INLINE void store_channels(S* p, Vec<A> v, int64_t count) {
    constexpr int L = kLanes<A>;
    if (__builtin_expect(count < L, 0)) return store_last_channels<A>(p, v, count);
    if constexpr (std::is_same_v<S, A>) {
        store(p, v);
    } else if constexpr (L % 8 == 0) {
        A lanes[L];
        store(lanes, v);
        for (int i = 0; i < L; i += 8) narrow8(lanes + i, p + i);
    } else {
        store_last_channels<A>(p, v, L);
    }
}

// Offsets of the rows and columns of an image, with `border` more on each side, which do not exist.
struct Offsets {
    static constexpr int64_t kOutside = -1;
    std::vector<int64_t> rows, columns;

    Offsets(const ImageView& image, const AdapterShape& shape, int64_t border, int64_t beyond)
        : rows(shape.h + border + beyond, kOutside), columns(shape.w + border + beyond, kOutside) {
        if (!image) return;
        for (int64_t y = 0; y < shape.h; ++y)
            rows[y + border] = y / image.patch * image.row[0] + y % image.patch * image.row[1];
        for (int64_t x = 0; x < shape.w; ++x)
            columns[x + border] = x / image.patch * image.column[0] + x % image.patch * image.column[1];
    }
};

template <class S>
S* frame_data(const ImageView& image, int64_t b, int64_t t) {
    return static_cast<S*>(image.data) + b * image.batch + t * image.frame;
}

// Squares of m x m results that cover every frame; those at the far sides may stick out.
struct Tiles {
    int64_t m, T, rows, columns, count;

    Tiles(const AdapterShape& shape, int m)
        : m(m),
          T(shape.T),
          rows(ceil_div(shape.h, m)),
          columns(ceil_div(shape.w, m)),
          count(shape.B * shape.T * rows * columns) {}

    struct Tile {
        int64_t b, t, y, x;  // y and x of the first result
    };
    Tile operator[](int64_t i) const {
        const int64_t frame = i / (rows * columns), square = i % (rows * columns);
        return {frame / T, frame % T, square / columns * m, square % columns * m};
    }
};

// Calls run(S{}) for the storage type of `dtype`, where A is the type that it is computed in.
template <class A, class Run>
void for_storage(DType dtype, const Run& run) {
    if constexpr (std::is_same_v<A, float>) {
        if (dtype == DType::kBFloat16) return run(BFloat16{});
        if (dtype == DType::kFloat16) return run(Float16{});
    }
    run(A{});
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
