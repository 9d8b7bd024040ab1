// 3x3 convolution. A block of tiles is brought into Winograd's domain, where the convolution is
// n * n independent matrix products over the channels, and back.
#pragma once

#include "common/product.h"
#include "temporal_adapter/tiles.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {

// What a block of tiles may take in the caches of one core: small blocks stay near it, large ones read the weights less
// often. On Zen 3 (512 KiB and a share of 32 MiB) 1 MiB is 7 to 15 % faster than 3 MiB, and 12 MiB is as much slower.
constexpr int64_t kBlockBytes = int64_t(3) << 19;

// How a block of `tiles` tiles is stored in Winograd's domain. Points and rows are an odd number of cache lines apart, or all
// of them would compete for the same few cache sets.
template <class A>
struct BlockLayout {
    static constexpr int64_t kLine = kCacheLine / int64_t(sizeof(A));
    int64_t tiles, row, left_point;      // left factor: [point][tile][row]
    int64_t panels, panel, right_point;  // [point][panel][tile][kCols]

    BlockLayout(int64_t C, int64_t O, int points, int64_t total, int num_threads, int64_t budget)
        : row(odd_lines(C)), panels(ceil_div(O, kCols<A>)) {
        const int64_t per_tile = points * (row + panels * kCols<A>)*int64_t(sizeof(A));
        const int64_t fair = round_up(ceil_div(total, num_threads), kRows);
        tiles = max<int64_t>(2 * kRows, min(fair, budget / per_tile / kRows * kRows));
        left_point = odd_lines(tiles * row);
        panel = tiles * kCols<A>;
        right_point = odd_lines(panels * panel);
    }
    static int64_t odd_lines(int64_t count) { return (ceil_div(count, kLine) | 1) * kLine; }
};

// Weights in Winograd's domain, [point][panel][C][kCols].
template <class A, int m>
Buffer<A> transform_weights(const Conv3x3& call) {
    constexpr int n = Winograd<A, m>::n, L = kLanes<A>;
    const int64_t panels = ceil_div(call.O, kCols<A>), C = call.C, point = panels * C * kCols<A>;
    Buffer<A> weights = allocate<A>(n * n * point);
    const A* in = static_cast<const A*>(call.weight);
    const int64_t* stride = call.weight_stride;
    parallel_for(panels * C, 64, call.shape.num_threads, 0, [&](int64_t first, int64_t last, Arena) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t p = i / C, c = i % C;
            for (int64_t half = 0; half < kCols<A>; half += L) {
                const int64_t o = p * kCols<A> + half;
                A taps[3][3][L] = {};
                for (int l = 0; l < min<int64_t>(L, call.O - o); ++l)
                    for (int y = 0; y < 3; ++y)
                        for (int x = 0; x < 3; ++x)
                            taps[y][x][l] = in[(o + l) * stride[0] + c * stride[1] + y * stride[2] + x * stride[3]];
                transform_square<A, 3, n>([](const auto& g, auto& u)
                                              __attribute__((always_inline)) { Winograd<A, m>::weight(g, u); },
                                          [&](int y, int x) __attribute__((always_inline)) { return load(taps[y][x]); },
                                          [&](int y, int x, Vec<A> u) __attribute__((always_inline)) {
                                              store(weights.get() + (y * n + x) * point + i * kCols<A> + half, u);
                                          });
            }
        }
    });
    return weights;
}

// Brings a vector of channels of one tile into Winograd's domain: left[point][c].
template <class A, int m>
struct InputTransform {
    static constexpr int n = Winograd<A, m>::n;
    const BlockLayout<A>& layout;
    A* left;

    template <class Pixel>
    TRITONKERN_INLINE void operator()(int64_t c, const Pixel& pixel) const {
        transform_square<A, n, n>(
            [](const auto& d, auto& v) __attribute__((always_inline)) { Winograd<A, m>::input(d, v); }, pixel,
            [&](int y, int x, Vec<A> v)
                __attribute__((always_inline)) { store(left + (y * n + x) * layout.left_point + c, v); });
    }
};

template <class A, int m>
TileTask<A> input_transform(const Source& source, const AdapterShape& shape, int64_t C, const Tiles& tiles,
                            const BlockLayout<A>& layout) {
    return with_reader<A, m>(source, shape, C, 1, m + 1, [&](auto reader) {
        return [reader, tiles, layout](int64_t first, int64_t last, A* left, A*) {
            for (int64_t i = first; i < last; ++i, left += layout.row)
                reader.template each<Winograd<A, m>::n, m == 2>(tiles[i], InputTransform<A, m>{layout, left});
        };
    });
}

// The m x m results of one tile, from its products.
template <class A, int m>
void output_square(const A* products, const BlockLayout<A>& layout, Vec<A> (&out)[m][m]) {
    constexpr int n = Winograd<A, m>::n;
    transform_square<A, n, m>(
        [](const auto& p, auto& y) __attribute__((always_inline)) { Winograd<A, m>::output(p, y); },
        [&](int y, int x) __attribute__((always_inline)) { return load(products + (y * n + x) * layout.right_point); },
        [&](int y, int x, Vec<A> v) __attribute__((always_inline)) { out[y][x] = v; });
}

// Where results go: bias, ReLU, residual and mask on the way.
template <class A, class S>
struct SquareWriter {
    const Conv3x3& call;
    Offsets at, residual_at, mask_at;

    explicit SquareWriter(const Conv3x3& call)
        : call(call),
          at(call.out, call.shape, 0, 0),
          residual_at(call.residual, call.shape, 0, 0),
          mask_at(call.mask, call.shape, 0, 0) {}

    template <int m>
    void write(const Tiles::Tile& tile, const A* products, const BlockLayout<A>& layout) const {
        constexpr int L = kLanes<A>;
        S* out = frame_data<S>(call.out, tile.b, tile.t);
        const S* residual = call.residual ? frame_data<const S>(call.residual, tile.b, tile.t) : nullptr;
        const A* mask = call.mask ? frame_data<const A>(call.mask, tile.b, tile.t) : nullptr;
        const A* bias = static_cast<const A*>(call.bias);
        const int64_t rows = min<int64_t>(m, call.shape.h - tile.y), columns = min<int64_t>(m, call.shape.w - tile.x);
        for (int64_t o = 0; o < call.O; o += L) {
            const A* in = products + o / kCols<A> * layout.panel + o % kCols<A>;
            const int64_t count = call.O - o;
            const Vec<A> summand = bias ? load_channels<A>(bias + o, count) : Vec<A>{};
            Vec<A> results[m][m];
            output_square<A, m>(in, layout, results);
            for (int y = 0; y < rows; ++y) {
                for (int x = 0; x < columns; ++x) {
                    const int64_t row = tile.y + y, column = tile.x + x;
                    Vec<A> v = results[y][x] + summand;
                    if (call.relu) v = v < 0 ? Vec<A>{} : v;
                    if (residual)
                        v +=
                            load_channels<A>(residual + residual_at.rows[row] + residual_at.columns[column] + o, count);
                    if (mask) {
                        const Vec<A> sign =
                            load_channels<A>(mask + mask_at.rows[row] + mask_at.columns[column] + o, count);
                        v = sign <= 0 ? Vec<A>{} : v;
                    }
                    store_channels<A>(out + at.rows[row] + at.columns[column] + o, v, count);
                }
            }
        }
    }
};

template <class A, int m>
void convolve(const Conv3x3& call) {
    constexpr int n = Winograd<A, m>::n, points = n * n;
    const Tiles tiles(call.shape, m);
    const BlockLayout<A> layout(call.C, call.O, points, tiles.count, call.shape.num_threads, kBlockBytes);
    const Buffer<A> weights = transform_weights<A, m>(call);
    const int64_t weights_panel = call.C * kCols<A>, weights_point = layout.panels * weights_panel;
    const int64_t scratch = points * (layout.left_point + layout.right_point) * int64_t(sizeof(A)) + 2 * kCacheLine;

    const TileTask<A> transform = input_transform<A, m>(call.source, call.shape, call.C, tiles, layout);
    TileTask<A> write;
    for_tile_storage<A, m>(call.out.dtype, [&](auto element) {
        const SquareWriter<A, decltype(element)> writer(call);
        write = [writer, tiles, layout](int64_t first, int64_t last, A* products, A*) {
            for (int64_t i = first; i < last; ++i, products += kCols<A>)
                writer.template write<m>(tiles[i], products, layout);
        };
    });
    parallel_for(tiles.count, layout.tiles, call.shape.num_threads, scratch,
                 [&](int64_t first, int64_t last, Arena arena) {
                     A* left = arena.take<A>(points * layout.left_point);
                     A* out = arena.take<A>(points * layout.right_point);
                     transform(first, last, left, nullptr);
                     for (int p = 0; p < points; ++p)
                         product<A, false>(last - first, call.C, layout.panels, left + p * layout.left_point,
                                           layout.row, weights.get() + p * weights_point, weights_panel,
                                           out + p * layout.right_point, layout.panel, false);
                     write(first, last, out, nullptr);
                 });
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
