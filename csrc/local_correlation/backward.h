// Gradients of local correlation, added to the caller's. With g[t, n, p, s] the gradient of the result, G of the values at the
// cells (`spread` of g) and v those values:
//   grad_features[t, cell] += sum over n, s of G[t, n, cell, s] support[n, s]
//   grad_support[n, s]     += sum over t, cells of G[t, n, cell, s] features[t, cell]
//   grad_position[t, n]    += `slopes` of v and g
// One task adds to a band of rows of a frame of features, or to the supports and positions of a point. Sums are in the order of
// points or frames, so they do not depend on the number of threads.
#pragma once

#include "local_correlation/forward.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

template <class S, class R>
class Backward {
    using A = Accumulator<S>;

    const LocalCorrelation& call;
    const int64_t P;

    // Gradients of the samples and of the values at the cells of one point and frame.
    struct Scratch {
        Supports<S> supports;
        Cells<S> cells;
        Lattice<S> lattice;
        A *grad_samples, *grad_values, *values, *grad_support;

        Scratch(const LocalCorrelation& call, int64_t P, Arena& arena)
            : supports(call, arena),
              cells(call, true, arena),
              lattice(call),
              grad_samples(arena.take<A>(P * supports.pitch)),
              grad_values(arena.take<A>(lattice.cells * supports.pitch)),
              values(arena.take<A>(lattice.cells * supports.pitch)),
              grad_support(arena.take<A>(call.S * supports.rows_pitch())) {}
    };

    // The cells of a lattice that exist: a pointer to the channels, and the gradients of the values there.
    template <class Target>
    struct ExistingCells {
        Target* rows[kMaxSide * kMaxSide];
        const A* grads[kMaxSide * kMaxSide];
        int64_t count = 0;
    };

  public:
    explicit Backward(const LocalCorrelation& call) : call(call), P((2 * call.radius + 1) * (2 * call.radius + 1)) {}

    void run() const {
        Arena count;
        Scratch(call, P, count);
        if (call.grad_features.data) {
            // Few frames are divided into bands, so that there is work for the threads of a large machine.
            const int64_t bands = max<int64_t>(1, min(call.height, 32 / max<int64_t>(1, call.B * call.T)));
            parallel_for(call.B * call.T * bands, 1, call.num_threads, count.used,
                         [&](int64_t first, int64_t last, Arena arena) {
                             Scratch scratch(call, P, arena);
                             for (int64_t task = first; task < last; ++task)
                                 features(task / bands / call.T, task / bands % call.T,
                                          task % bands * call.height / bands, (task % bands + 1) * call.height / bands,
                                          scratch);
                         });
        }
        if (call.grad_support.data || call.grad_position.data) {
            parallel_for(call.B * call.N, 1, call.num_threads, count.used,
                         [&](int64_t first, int64_t last, Arena arena) {
                             Scratch scratch(call, P, arena);
                             for (int64_t point = first; point < last; ++point)
                                 support(point / call.N, point % call.N, scratch);
                         });
        }
    }

  private:
    // The band of rows begin..end-1 of one frame.
    void features(int64_t b, int64_t t, int64_t begin, int64_t end, Scratch& scratch) const {
        Lattice<S>& lattice = scratch.lattice;
        const Supports<S>& supports = scratch.supports;
        const int64_t* stride = call.grad_features.stride;
        A* frame = static_cast<A*>(call.grad_features.data) + b * stride[0] + t * stride[1];
        for (int64_t n = 0; n < call.N; ++n) {
            lattice.place(call, b, t, n);
            const auto in_band = [&](int64_t row) { return begin <= row && row < end; };
            if (!lattice.known || std::none_of(lattice.row_index, lattice.row_index + lattice.side, in_band)) continue;
            scratch.supports.load_rows(b, n, t);
            load_grads(b, t, n, scratch);
            merge_repeated_cells(lattice, supports.pitch, scratch.grad_values);
            ExistingCells<A> cells;
            for (int64_t y = 0; y < lattice.side; ++y) {
                if (!in_band(lattice.row_index[y]) || repeated(lattice.row_index, y, lattice.side)) continue;
                for (int64_t x = 0; x < lattice.side; ++x) {
                    const int64_t column = lattice.column_index[x];
                    if (column < 0 || repeated(lattice.column_index, x, lattice.side)) continue;
                    cells.rows[cells.count] = frame + lattice.row_index[y] * stride[2] + column * stride[3];
                    cells.grads[cells.count++] = scratch.grad_values + (y * lattice.side + x) * supports.pitch;
                }
            }
            add_products(cells.rows, cells.grads, cells.count, supports.rows(), supports.rows_pitch(), call.S, call.C);
        }
    }

    // Supports and positions of one point in all frames.
    void support(int64_t b, int64_t n, Scratch& scratch) const {
        const Lattice<S>& lattice = scratch.lattice;
        const Supports<S>& supports = scratch.supports;
        const bool own = call.supports_differ;
        clear(scratch);
        if (!own && call.grad_position.data) scratch.supports.load(b, n, 0);
        for (int64_t t = 0; t < call.T; ++t) {
            scratch.lattice.place(call, b, t, n);
            if (lattice.known) {
                scratch.cells.find(lattice, b, t);
                load_grads(b, t, n, scratch);
                if (call.grad_support.data) add_to_support(scratch);
                if (call.grad_position.data) {
                    if (own) scratch.supports.load(b, n, t);
                    position(b, t, n, scratch);
                }
            } else {
                const A nan = std::numeric_limits<A>::quiet_NaN();
                std::fill(scratch.grad_support, scratch.grad_support + call.S * supports.rows_pitch(), nan);
                if (call.grad_position.data) add_to_position(b, t, n, nan, nan);
            }
            if (own && call.grad_support.data) {
                write_support(b, n, t, scratch);
                clear(scratch);
            }
        }
        if (!own && call.grad_support.data) write_support(b, n, 0, scratch);
    }

    void clear(Scratch& scratch) const {
        std::fill(scratch.grad_support, scratch.grad_support + call.S * scratch.supports.rows_pitch(), A(0));
    }

    void add_to_support(Scratch& scratch) const {
        const Lattice<S>& lattice = scratch.lattice;
        ExistingCells<const A> cells;
        for (int64_t i = 0; i < lattice.cells; ++i) {
            if (lattice.row_index[i / lattice.side] < 0 || lattice.column_index[i % lattice.side] < 0) continue;
            cells.rows[cells.count] = scratch.cells.rows[i];
            cells.grads[cells.count++] = scratch.grad_values + i * scratch.supports.pitch;
        }
        const int64_t pitch = scratch.supports.rows_pitch();
        add_transposed_products(cells.rows, cells.grads, cells.count, call.S, pitch, scratch.grad_support, pitch);
    }

    void write_support(int64_t b, int64_t n, int64_t t, const Scratch& scratch) const {
        const int64_t* stride = call.grad_support.stride;
        A* out = static_cast<A*>(call.grad_support.data) + b * stride[0] + n * stride[1] + t * stride[2];
        for (int64_t s = 0; s < call.S; ++s) {
            const A* in = scratch.grad_support + s * scratch.supports.rows_pitch();
            for (int64_t c = 0; c < call.C; ++c) out[s * stride[3] + c] += in[c];
        }
    }

    void position(int64_t b, int64_t t, int64_t n, Scratch& scratch) const {
        const Lattice<S>& lattice = scratch.lattice;
        scratch.supports.correlate(scratch.cells.rows, lattice.cells, scratch.values);
        A grad_slow, grad_fast;
        slopes(scratch.values, scratch.grad_samples, lattice.side, scratch.supports.pitch, lattice.slow, lattice.fast,
               &grad_slow, &grad_fast);
        add_to_position(b, t, n, grad_slow, grad_fast);
    }

    void add_to_position(int64_t b, int64_t t, int64_t n, A grad_slow, A grad_fast) const {
        const int64_t* stride = call.grad_position.stride;
        A* out = static_cast<A*>(call.grad_position.data) + b * stride[0] + t * stride[1] + n * stride[2];
        out[0] += call.x_is_fast ? grad_fast : grad_slow;
        out[stride[3]] += call.x_is_fast ? grad_slow : grad_fast;
    }

    // The gradients of the samples as planes of whole vectors, and from them those of the values at the cells.
    void load_grads(int64_t b, int64_t t, int64_t n, Scratch& scratch) const {
        const R* in = sample_row<R>(call, b, t, n);
        const int64_t pitch = scratch.supports.pitch;
        for (int64_t p = 0; p < P; ++p) {
            A* out = scratch.grad_samples + p * pitch;
            widen_row(in + p * call.S, 1, call.S, out);
            std::fill(out + call.S, out + pitch, A(0));
        }
        const Lattice<S>& lattice = scratch.lattice;
        spread(scratch.grad_samples, lattice.side, pitch, lattice.slow, lattice.fast, scratch.grad_values);
    }

    // Beyond the border several cells of a lattice are one cell of the map; the last of them gets the gradients of all.
    static bool repeated(const int64_t* index, int64_t i, int64_t side) {
        return i + 1 < side && index[i] == index[i + 1];
    }

    static void merge_repeated_cells(const Lattice<S>& lattice, int64_t pitch, A* grad_values) {
        const int64_t side = lattice.side;
        const auto add = [&](int64_t from, int64_t to) {
            for (int64_t i = 0; i < pitch; ++i) grad_values[to * pitch + i] += grad_values[from * pitch + i];
        };
        for (int64_t y = 0; y < side; ++y)
            for (int64_t x = 0; repeated(lattice.row_index, y, side) && x < side; ++x)
                add(y * side + x, (y + 1) * side + x);
        for (int64_t x = 0; x < side; ++x)
            for (int64_t y = 0; repeated(lattice.column_index, x, side) && y < side; ++y)
                add(y * side + x, y * side + x + 1);
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
