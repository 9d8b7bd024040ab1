// Tiles of an image on their way into and out of Winograd's domain, one vector of channels at a time.
#pragma once

#include <functional>

#include "temporal_adapter/pixels.h"
#include "temporal_adapter/winograd.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {

// A square of pixels in memory.
template <class A, int n>
struct Square {
    Vec<A> pixels[n][n] = {};

    TRITONKERN_INLINE Vec<A> operator()(int y, int x) const { return pixels[y][x]; }
};

// Compiled once for all readers that end in the same `use`.
template <class A, int n, class Use>
__attribute__((noinline)) void use_square(const Use& use, int64_t c, const Square<A, n>& square) {
    use(c, square);
}

// Reads squares of `n` x `n` pixels, after the source's affine map, ReLU or mask, and zero beyond the image.
template <class A, class S, Load kLoad>
struct SquareReader {
    Source source;
    int64_t C;
    Offsets at, mask_at;

    // Square (y, x) begins `border` pixels above and left of pixel (y, x).
    SquareReader(const Source& source, const AdapterShape& shape, int64_t C, int64_t border, int64_t beyond)
        : source(source), C(C), at(source.image, shape, border, beyond), mask_at(source.mask, shape, border, beyond) {}

    // Calls use(c, square) for every vector of channels. Pixels go `straight` from the image into what is done with them, or,
    // as at the image's border, by way of memory, which is a little slower and saves most of the code.
    template <int n, bool straight, class Use>
    TRITONKERN_INLINE void each(const Tiles::Tile& tile, const Use& use) const {
        constexpr int L = kLanes<A>;
        const S* data = frame_data<const S>(source.image, tile.b, tile.t);
        const A* mask = kLoad == Load::kMasked ? frame_data<const A>(source.mask, tile.b, tile.t) : nullptr;
        const A* scale = static_cast<const A*>(source.scale) + (kLoad == Load::kAffine ? tile.b * C : 0);
        const A* shift = static_cast<const A*>(source.shift) + (kLoad == Load::kAffine ? tile.b * C : 0);
        const int64_t *rows = &at.rows[tile.y], *columns = &at.columns[tile.x];
        const int64_t *mask_rows = &mask_at.rows[tile.y], *mask_columns = &mask_at.columns[tile.x];
        bool inside = true;
        for (int i = 0; i < n; ++i) inside = inside && rows[i] != Offsets::kOutside && columns[i] != Offsets::kOutside;

        for (int64_t c = 0; c < C; c += L) {
            Vec<A> factor{}, summand{};
            if constexpr (kLoad == Load::kAffine) {
                factor = load_channels<A>(scale + c, C - c);
                summand = load_channels<A>(shift + c, C - c);
            }
            const auto pixel = [&](int y, int x) __attribute__((always_inline)) {
                Vec<A> v = load_channels<A>(data + rows[y] + columns[x] + c, C - c);
                if constexpr (kLoad == Load::kAffine) v = v * factor + summand;
                if constexpr (kLoad == Load::kRelu) v = v < 0 ? Vec<A>{} : v;
                if constexpr (kLoad == Load::kMasked) {
                    const Vec<A> sign = load_channels<A>(mask + mask_rows[y] + mask_columns[x] + c, C - c);
                    v = sign <= 0 ? Vec<A>{} : v;
                }
                return v;
            };
            if constexpr (straight) {
                if (inside) {
                    use(c, pixel);
                    continue;
                }
            }
            Square<A, n> square;
            for (int y = 0; y < n; ++y) {
                if (rows[y] == Offsets::kOutside) continue;
                for (int x = 0; x < n; ++x)
                    if (columns[x] != Offsets::kOutside) square.pixels[y][x] = pixel(y, x);
            }
            use_square(use, c, square);
        }
    }
};

// Applies `transform` (from `from` to `to` vectors) along both axes: out(y, x, value) for all `to` x `to` results.
template <class A, int from, int to, class Transform, class In, class Out>
TRITONKERN_INLINE void transform_square(const Transform& transform, const In& in, const Out& out) {
    Vec<A> half[to][from];
    TRITONKERN_UNROLL
    for (int x = 0; x < from; ++x) {
        Vec<A> line[from], result[to];
        TRITONKERN_UNROLL
        for (int y = 0; y < from; ++y) line[y] = in(y, x);
        transform(line, result);
        TRITONKERN_UNROLL
        for (int y = 0; y < to; ++y) half[y][x] = result[y];
    }
    TRITONKERN_UNROLL
    for (int y = 0; y < to; ++y) {
        Vec<A> result[to];
        transform(half[y], result);
        TRITONKERN_UNROLL
        for (int x = 0; x < to; ++x) out(y, x, result[x]);
    }
}

// Does something with the tiles [first, last): the one indirect call between the kinds of sources and the products, or
// every pair of source and result would be compiled on its own.
template <class A>
using TileTask = std::function<void(int64_t first, int64_t last, A* data, A* sums)>;

// Calls run(S{}) for the storage types that tiles of m x m have to do with: those of 2 are for exact results, of images
// that are as exact; those of 4 err by less than 16-bit storage rounds.
template <class A, int m, class Run>
void for_tile_storage(DType dtype, const Run& run) {
    if constexpr (m == 2) {
        run(A{});
    } else {
        for_storage<A>(dtype, run);
    }
}

// make(reader) for the source's storage type and load.
template <class A, int m, class Make>
TileTask<A> with_reader(const Source& source, const AdapterShape& shape, int64_t C, int64_t border, int64_t beyond,
                        const Make& make) {
    TileTask<A> task;
    const auto reader = [&](auto element, auto how) {
        task = make(SquareReader<A, decltype(element), decltype(how)::value>(source, shape, C, border, beyond));
    };
    using Plain = std::integral_constant<Load, Load::kPlain>;
    using Affine = std::integral_constant<Load, Load::kAffine>;
    switch (source.load) {
        case Load::kPlain:
            for_tile_storage<A, m>(source.image.dtype, [&](auto element) { reader(element, Plain{}); });
            break;
        case Load::kAffine:
            for_tile_storage<A, m>(source.image.dtype, [&](auto element) { reader(element, Affine{}); });
            break;
        case Load::kRelu:  // the image between two convolutions always has the type of the accumulator
            reader(A{}, std::integral_constant<Load, Load::kRelu>{});
            break;
        case Load::kMasked:
            reader(A{}, std::integral_constant<Load, Load::kMasked>{});
            break;
    }
    return task;
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
