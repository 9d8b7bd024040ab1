// The frames of a task: a stretch of a track, and rows of the frames that it reads.
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "common/rows.h"
#include "temporal_mixer/call.h"

namespace tritonkern::TRITONKERN_ISA::temporal_mixer {

// Long tracks are cut into stretches of so many frames that their rows stay in the second-level cache.
inline int64_t stretch_length(const TemporalMixer& call) {
    return min<int64_t>(max<int64_t>(16384 / call.C, 8), 32);
}
inline int64_t stretches(const TemporalMixer& call) {
    return ceil_div(call.T, stretch_length(call));
}
inline int64_t tasks(const TemporalMixer& call) {
    return call.B * call.N * stretches(call);
}

// Frames [first, last) of one track.
struct Stretch {
    int64_t b, n, first, last;

    Stretch(const TemporalMixer& call, int64_t task) {
        const int64_t track = task / stretches(call), length = stretch_length(call);
        b = track / call.N, n = track % call.N;
        first = task % stretches(call) * length;
        last = min(first + length, call.T);
    }
};

// Frames lo, lo + 1, ... of one track as rows of A, padded to whole vectors.
template <class A>
struct Frames {
    A* data;
    int64_t lo = 0, pitch;

    A* row(int64_t t) const { return data + (t - lo) * pitch; }

    // Reads those of the frames lo..hi-1 of `from` that exist; zeros after the channels.
    void fetch(const TemporalMixer& call, const TensorView& from, const Stretch& at, int64_t first, int64_t end) {
        lo = max<int64_t>(first, 0);
        for (int64_t t = lo; t < min(end, call.T); ++t) {
            const int64_t offset = at.b * from.stride[0] + at.n * from.stride[1] + t * from.stride[2];
            read_row(call.dtype, from.data, offset, call.C, row(t));
            std::fill(row(t) + call.C, row(t) + pitch, A(0));
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::temporal_mixer
