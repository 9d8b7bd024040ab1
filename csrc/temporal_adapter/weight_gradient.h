// Weight gradient of the 3x3 convolution: the adjoint of each step of the convolution. In Winograd's domain it is a product
// over tiles, [C, tiles] x [tiles, O] for each point.
//
// Block after block of tiles, threads first share out the tiles (into Winograd's domain), then the rows of the result: every
// sum is taken in the order of the tiles, whatever the number of threads.
#pragma once

#include "temporal_adapter/convolution.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {

// Brings a vector of channels of one tile of gradients of results into Winograd's domain, right[point][panel][kCols], and adds
// them up in `sums` [O].
template <class A, int m>
struct GradOutputTransform {
    static constexpr int n = Winograd<A, m>::n;
    const BlockLayout<A>& layout;
    A *right, *sums;

    template <class Pixel>
    TRITONKERN_INLINE void operator()(int64_t o, const Pixel& pixel) const {
        A* to = right + o / kCols<A> * layout.panel + o % kCols<A>;
        Vec<A> sum = load(sums + o);
        transform_square<A, m, n>(
            [](const auto& y, auto& p) __attribute__((always_inline)) { Winograd<A, m>::grad_output(y, p); },
            [&](int y, int x) __attribute__((always_inline)) {
                const Vec<A> v = pixel(y, x);
                sum += v;
                return v;
            },
            [&](int y, int x, Vec<A> v)
                __attribute__((always_inline)) { store(to + (y * n + x) * layout.right_point, v); });
        store(sums + o, sum);
    }
};

template <class A, int m>
TileTask<A> grad_output_transform(const Source& grad_out, const AdapterShape& shape, int64_t O, const Tiles& tiles,
                                  const BlockLayout<A>& layout) {
    return with_reader<A, m>(grad_out, shape, O, 0, m, [&](auto reader) {
        return [reader, tiles, layout](int64_t first, int64_t last, A* right, A* sums) {
            for (int64_t i = first; i < last; ++i, right += kCols<A>)
                reader.template each<m, m == 2>(tiles[i], GradOutputTransform<A, m>{layout, right, sums});
        };
    });
}

// grad_weight [O, C, 3, 3] from products [point][panel][C][kCols].
template <class A, int m>
void write_grad_weight(const Conv3x3WeightGradient& call, const A* products) {
    constexpr int n = Winograd<A, m>::n, L = kLanes<A>;
    const int64_t panels = ceil_div(call.O, kCols<A>), C = call.C, point = panels * C * kCols<A>;
    A* out = static_cast<A*>(call.grad_weight);
    parallel_for(panels * C, 64, call.shape.num_threads, 0, [&](int64_t first, int64_t last, Arena) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t p = i / C, c = i % C;
            for (int64_t half = 0; half < kCols<A>; half += L) {
                const int64_t o = p * kCols<A> + half;
                A taps[3][3][L];
                transform_square<A, n, 3>(
                    [](const auto& u, auto& g) __attribute__((always_inline)) { Winograd<A, m>::grad_weight(u, g); },
                    [&](int y, int x) __attribute__((always_inline)) {
                        return load(products + (y * n + x) * point + i * kCols<A> + half);
                    },
                    [&](int y, int x, Vec<A> g) __attribute__((always_inline)) { store(taps[y][x], g); });
                for (int l = 0; l < min<int64_t>(L, call.O - o); ++l)
                    for (int tap = 0; tap < 9; ++tap) out[((o + l) * C + c) * 9 + tap] = taps[tap / 3][tap % 3][l];
            }
        }
    });
}

template <class A, int m>
void weight_gradient(const Conv3x3WeightGradient& call) {
    constexpr int n = Winograd<A, m>::n, points = n * n;
    constexpr int64_t group = 8, rows = 8 * kRows;  // tiles, and rows of a product, that one task takes
    const Tiles tiles(call.shape, m);
    const BlockLayout<A> layout(call.C, call.O, points, tiles.count, 1, 4 * kBlockBytes);
    const Buffer<A> left = allocate<A>(points * layout.left_point), right = allocate<A>(points * layout.right_point);
    const int64_t products_panel = call.C * kCols<A>, products_point = layout.panels * products_panel;
    const Buffer<A> products = allocate<A>(points * products_point);
    const int64_t width = layout.panels * kCols<A>, groups = ceil_div(layout.tiles, group);
    const int64_t chunks = ceil_div(call.C, rows);
    std::vector<A> sums(groups * width);
    std::vector<double> bias(width, 0.0);

    const TileTask<A> transform_source = input_transform<A, m>(call.source, call.shape, call.C, tiles, layout);
    const TileTask<A> transform_grad = grad_output_transform<A, m>(call.grad_out, call.shape, call.O, tiles, layout);

    // Channels beyond O are never read from a gradient; their products must be zero, not what memory held.
    std::fill(right.get(), right.get() + points * layout.right_point, A(0));
    for (int64_t begin = 0; begin < tiles.count; begin += layout.tiles) {
        const int64_t count = min(layout.tiles, tiles.count - begin);
        std::fill(sums.begin(), sums.end(), A(0));
        parallel_for(count, group, call.shape.num_threads, 0, [&](int64_t first, int64_t last, Arena) {
            transform_source(begin + first, begin + last, left.get() + first * layout.row, nullptr);
            transform_grad(begin + first, begin + last, right.get() + first * kCols<A>, &sums[first / group * width]);
        });
        for (int64_t i = 0; i < groups * width; ++i) bias[i % width] += sums[i];
        parallel_for(points * chunks, 1, call.shape.num_threads, 0, [&](int64_t task, int64_t, Arena) {
            const int64_t p = task / chunks, c = task % chunks * rows;
            product<A, true>(min(rows, call.C - c), count, layout.panels, left.get() + p * layout.left_point + c,
                             layout.row, right.get() + p * layout.right_point, layout.panel,
                             products.get() + p * products_point + c * kCols<A>, products_panel, begin > 0);
        });
    }
    write_grad_weight<A, m>(call, products.get());
    for (int64_t o = 0; o < call.O; ++o) static_cast<A*>(call.grad_bias)[o] = A(bias[o]);
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
