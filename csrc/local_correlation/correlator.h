// What one thread needs to correlate lattices of cells with the supports of a point.
#pragma once

#include <algorithm>

#include "local_correlation/lattice.h"
#include "local_correlation/products.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

// `count` elements `stride` apart, in the type of sums.
template <class S>
inline void widen_row(const S* in, int64_t stride, int64_t count, Accumulator<S>* out) {
    int64_t i = 0;
    if (stride == 1) {
        for (; i + 8 <= count; i += 8) widen8(in + i, out + i);
    }
    for (; i < count; ++i) out[i] = widen(in[i * stride]);
}

// The channels of the cells of a lattice: in place, or copied into the type of sums.
template <class S>
class Cells {
    using A = Accumulator<S>;

    const LocalCorrelation& call;

  public:
    const A* rows[kMaxSide * kMaxSide];  // a missing cell is a row of zeros
    const bool in_place;

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
        for (int64_t y = 0, i = 0; y < lattice.side; ++y) {
            for (int64_t x = 0; x < lattice.side; ++x, ++i) {
                const int64_t row = lattice.row_index[y], column = lattice.column_index[x];
                rows[i] = row < 0 || column < 0 ? zeros : read(frame + row * stride[2] + column * stride[3], i);
            }
        }
    }

  private:
    const A* read(const S* cell, int64_t i) {
        if constexpr (std::is_same_v<S, A>) {
            if (in_place) return cell;
        }
        A* copy = copies + i * pitch;
        widen_row(cell, call.features.stride[4], call.C, copy);
        std::fill(copy + call.C, copy + pitch, A(0));
        return copy;
    }

    const int64_t pitch;
    A *copies, *zeros;
};

// The supports of a point and their products with cells.
template <class S>
class Supports {
    using A = Accumulator<S>;
    static constexpr int64_t L = kLanes<A>;

  public:
    const int64_t pitch;  // lanes of a plane of values: S rounded up to whole vectors

    Supports(const LocalCorrelation& call, Arena& arena)
        : pitch(round_up(call.S, L)),
          call(call),
          // A few supports beyond the last whole vector are dot products along the channels instead.
          dots(call.S % L <= L / 4 ? call.S % L : 0),
          vectors(ceil_div(call.S - dots, L)),
          row_pitch(round_up(call.C, L)),
          row(arena.take<A>(round_up(call.S, L) * round_up(call.C, L))),
          panels(arena.take<A>(vectors * L * row_pitch)) {}

    // Loads them as rows alone.
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

    // Loads the supports of point n (in frame t, where they differ), ready for `correlate`.
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

    // values[cell * pitch + s] = cells[cell] . support[s]; lanes beyond S are zero. The rows `next`, unless null, are prefetched
    // meanwhile.
    void correlate(const A* const* cells, int64_t count, A* values, const A* const* next = nullptr) const {
        int64_t i = 0;
        for (; i + kTileCells <= count; i += kTileCells) correlate_tile<kTileCells>(cells, i, values, next);
        for (; i < count; i += 4) correlate_tile<4>(cells, i, values, next);
    }

  private:
    template <int Count>
    void correlate_tile(const A* const* cells, int64_t i, A* values, const A* const* next) const {
        if (next) {
            for (int k = 0; k < Count; ++k)
                for (int64_t c = 0; c < call.C; c += kCacheLine / int64_t(sizeof(A)))
                    __builtin_prefetch(next[i + k] + c, 0, 2);
        }
        values += i * pitch, cells += i;
        for (int64_t first = 0; first < vectors; first += kTileVectors) {
            const A* panel = panels + first * L * row_pitch;
            A* out = values + first * L;
            const int64_t width = vectors - first;
            if (width >= 3)
                detail::tile<A, Count, 3>(cells, panel, call.C, out, pitch);
            else if (width == 2)
                detail::tile<A, Count, 2>(cells, panel, call.C, out, pitch);
            else
                detail::tile<A, Count, 1>(cells, panel, call.C, out, pitch);
        }
        for (int k = 0; dots > 0 && k < Count; k += 4) {
            A* out = values + k * pitch + vectors * L;
            for (int j = 0; j < 4; ++j) store(out + j * pitch, Vec<A>{});
            for (int64_t d = 0; d < dots; ++d) {
                A sums[4];
                four_dots(cells + k, row + (vectors * L + d) * row_pitch, call.C, sums);
                for (int j = 0; j < 4; ++j) out[j * pitch + d] = sums[j];
            }
        }
    }

    const LocalCorrelation& call;
    const int64_t dots, vectors, row_pitch;
    A *const row, *const panels;
};

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
