// What one thread needs to correlate lattices of cells with the supports of a point.
#pragma once

#include <algorithm>

#include "local_correlation/lattice.h"
#include "local_correlation/products.h"

namespace tritonkern::TRITONKERN_ISA {

// `count` elements `stride` apart, in the type of sums.
template <class S>
inline void widen_row(const S* in, int64_t stride, int64_t count, Accumulator<S>* out) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + 8 <= count; i += 8) widen8(in + i, out + i);
    }
    for (; i < count; ++i) out[i] = widen(in[i * stride]);
}

// The channels of the cells of a lattice: where they lie, or copied.
template <class S>
class Cells {
    using A = Accumulator<S>;

  public:
    const A* rows[kMostSide * kMostSide];  // a missing cell is a row of zeros

    Cells(const LocalCorrelation& call, bool whole_vectors, Arena& arena)
        : call(call),
          in_place(std::is_same_v<S, A> && call.features.stride[4] == 1 && !(whole_vectors && call.C % kLanes<A> != 0)),
          pitch(round_up(call.C, kLanes<A>)) {
        const int64_t side = 2 * call.radius + 2;
        copies = arena.take<A>(in_place ? 0 : side * side * pitch);
        zeros = arena.take<A>(pitch);
        if (arena.base) std::fill(zeros, zeros + pitch, A(0));
    }

    void find(const Lattice<S>& lattice, int64_t b, int64_t t) {
        const int64_t* stride = call.features.stride;
        const S* frame = static_cast<const S*>(call.features.data) + b * stride[0] + t * stride[1];
        for (int64_t i = 0; i < lattice.cells; ++i) {
            const int64_t y = lattice.row_index[i / lattice.side], x = lattice.column_index[i % lattice.side];
            if (y < 0 || x < 0) {
                rows[i] = zeros;
                continue;
            }
            const S* cell = frame + y * stride[2] + x * stride[3];
            if constexpr (std::is_same_v<S, A>) {
                if (in_place) {
                    rows[i] = cell;
                    continue;
                }
            }
            A* copy = copies + i * pitch;
            widen_row(cell, stride[4], call.C, copy);
            std::fill(copy + call.C, copy + pitch, A(0));
            rows[i] = copy;
        }
    }

  private:
    const LocalCorrelation& call;
    const bool in_place;
    const int64_t pitch;
    A *copies, *zeros;
};

// The supports of a point and their products with cells.
template <class S>
class Supports {
    using A = Accumulator<S>;
    static constexpr int64_t L = kLanes<A>;

  public:
    const int64_t pitch;  // lanes of a plane: S rounded up to whole vectors

    Supports(const LocalCorrelation& call, Arena& arena)
        : pitch(round_up(call.S, L)),
          call(call),
          // A few supports more than whole vectors are dot products along the channels.
          dots(call.S % L <= L / 4 ? call.S % L : 0),
          vectors(ceil_div(call.S - dots, L)),
          row_pitch(round_up(call.C, L)),
          row(arena.take<A>(round_up(call.S, L) * round_up(call.C, L))),
          panels(arena.take<A>(vectors * L * row_pitch)) {}

    void load_rows(int64_t b, int64_t n, int64_t t) {
        const int64_t* stride = call.support.stride;
        const S* support = static_cast<const S*>(call.support.data) + b * stride[0] + n * stride[1] + t * stride[2];
        for (int64_t s = 0; s < pitch; ++s) {
            A* out = row + s * row_pitch;
            const int64_t count = s < call.S ? call.C : 0;
            if (count) widen_row(support + s * stride[3], stride[4], count, out);
            std::fill(out + count, out + row_pitch, A(0));
        }
    }

    // What `correlate` needs.
    void load(int64_t b, int64_t n, int64_t t) {
        load_rows(b, n, t);
        for (int64_t first = 0; first < vectors; first += kTileVectors) {
            const int64_t width = min<int64_t>(kTileVectors, vectors - first);
            for (int64_t v = 0; v < width; ++v) {
                const Rows<A> rows{row + (first + v) * L * row_pitch, row_pitch};
                transpose_rows<A>(rows, L, row_pitch, panels + first * L * row_pitch + v * L, width * L);
            }
        }
    }

    const A* rows() const { return row; }
    int64_t rows_pitch() const { return row_pitch; }

    // values[cell * pitch + s]; lanes beyond S are zero.
    void correlate(const A* const* cells, int64_t count, A* values) const {
        for (int64_t first = 0; first < vectors; first += kTileVectors) {
            const A* panel = panels + first * L * row_pitch;
            A* out = values + first * L;
            const int64_t width = vectors - first;
            if (width >= 3)
                detail::panel_product<A, 3>(cells, count, panel, call.C, out, pitch);
            else if (width == 2)
                detail::panel_product<A, 2>(cells, count, panel, call.C, out, pitch);
            else
                detail::panel_product<A, 1>(cells, count, panel, call.C, out, pitch);
        }
        if (dots == 0) return;
        for (int64_t i = 0; i < count; i += 4) {
            A* out = values + i * pitch + vectors * L;
            for (int k = 0; k < 4; ++k) store(out + k * pitch, Vec<A>{});
            for (int64_t d = 0; d < dots; ++d) {
                A sums[4];
                four_dots(cells + i, row + (vectors * L + d) * row_pitch, call.C, sums);
                for (int k = 0; k < 4; ++k) out[k * pitch + d] = sums[k];
            }
        }
    }

  private:
    const LocalCorrelation& call;
    const int64_t dots, vectors, row_pitch;
    A *const row, *const panels;
};

}  // namespace tritonkern::TRITONKERN_ISA
