// The correlations of all points:
//   out[t, n, p, s] = support[n, s] . f_t(position[t, n] + offset[p]),   f_t: frame t, bilinearly interpolated
// or the softmax of these over p.
#pragma once

#include <limits>

#include "local_correlation/correlator.h"
#include "local_correlation/softmax.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

// The row of out or grad_out of one point and frame: P * S adjacent numbers of type R.
template <class R>
inline R* sample_row(const LocalCorrelation& call, int64_t b, int64_t t, int64_t n) {
    const int64_t* stride = call.rows.stride;
    return static_cast<R*>(call.rows.data) + b * stride[0] + t * stride[1] + n * stride[2];
}

// Frames of one point per task. Packing its supports costs about as much as one frame.
constexpr int64_t kTaskFrames = 16;

// S, R: types of the inputs and of the result.
template <class S, class R>
class Forward {
    using A = Accumulator<S>;

    struct Scratch {
        Supports<S> supports;
        Cells<S> cells, next_cells;
        Lattice<S> lattice, next;
        A *values, *row, *samples;

        Scratch(const LocalCorrelation& call, Arena& arena)
            : supports(call, arena),
              cells(call, false, arena),
              next_cells(call, false, arena),
              lattice(call),
              next(call),
              values(arena.take<A>(lattice.cells * supports.pitch)),
              row(arena.take<A>(lattice.side * supports.pitch)),
              samples(arena.take<A>((lattice.side - 1) * (lattice.side - 1) * call.S)) {}
    };

    const LocalCorrelation& call;

  public:
    explicit Forward(const LocalCorrelation& call) : call(call) {}

    void run() const {
        Arena count;
        Scratch(call, count);
        const int64_t chunks = ceil_div(call.T, kTaskFrames);
        parallel_for(call.B * call.N * chunks, 1, call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         Scratch scratch(call, arena);
                         for (int64_t task = first; task < last; ++task) {
                             const int64_t point = task / chunks, begin = task % chunks * kTaskFrames;
                             frames(point / call.N, point % call.N, begin, min(begin + kTaskFrames, call.T), scratch);
                         }
                     });
    }

  private:
    void frames(int64_t b, int64_t n, int64_t begin, int64_t end, Scratch& scratch) const {
        scratch.next.place(call, b, begin, n);
        for (int64_t t = begin; t < end; ++t) {
            std::swap(scratch.lattice, scratch.next);
            if (t == begin || call.supports_differ) scratch.supports.load(b, n, t);
            if (t + 1 < end) scratch.next.place(call, b, t + 1, n);
            samples(b, t, n, t + 1 < end && scratch.next.known, scratch);
        }
    }

    void samples(int64_t b, int64_t t, int64_t n, bool fetch_next, Scratch& scratch) const {
        const Lattice<S>& lattice = scratch.lattice;
        const int64_t count = (lattice.side - 1) * (lattice.side - 1) * call.S;
        R* out = sample_row<R>(call, b, t, n);
        if (!lattice.known) {
            for (int64_t i = 0; i < count; ++i) narrow(std::numeric_limits<A>::quiet_NaN(), out + i);
            return;
        }
        scratch.cells.find(lattice, b, t);
        const A* const* next = nullptr;
        if (fetch_next && scratch.cells.in_place) {
            scratch.next_cells.find(scratch.next, b, t + 1);
            next = scratch.next_cells.rows;
        }
        scratch.supports.correlate(scratch.cells.rows, lattice.cells, scratch.values, next);
        const int64_t pitch = scratch.supports.pitch;
        const auto interpolate_into = [&](A* to) {
            interpolate(scratch.values, lattice.side, pitch, call.S, lattice.slow, lattice.fast, scratch.row, to,
                        count);
            if (call.scale > 0) softmax(to, (lattice.side - 1) * (lattice.side - 1), call.S, A(call.scale));
        };
        if constexpr (std::is_same_v<R, A>) {
            interpolate_into(out);
        } else {
            interpolate_into(scratch.samples);
            int64_t i = 0;
            for (; i + 8 <= count; i += 8) narrow8(scratch.samples + i, out + i);
            for (; i < count; ++i) narrow(scratch.samples[i], out + i);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
