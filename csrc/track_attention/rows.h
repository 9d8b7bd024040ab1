// Rows of D elements of one frame, of any strides: read in place, copied, or written.
#pragma once

#include <algorithm>

#include "common/strided.h"
#include "track_attention/call.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

// The rows (i, h) of frame (b, t) of a tensor; i counts its cells or tracks.
template <class S>
class FrameRows {
    using A = Accumulator<S>;

  public:
    FrameRows(const TensorView& view, int64_t b, int64_t t, int64_t width, int64_t dim)
        : data(static_cast<S*>(view.data) + b * view.stride[0] + t * view.stride[1]),
          y_stride(view.stride[2]),
          x_stride(view.stride[3]),
          head_stride(view.stride[4]),
          channel_stride(view.stride[5]),
          width(width),
          dim(dim) {}

    // A row as whole vectors of A: in place, or copied into `buffer`.
    const A* read(int64_t i, int64_t h, A* buffer) const {
        const S* in = at(i, h);
        if constexpr (std::is_same_v<S, A>) {
            if (channel_stride == 1 && dim % kLanes<A> == 0) return in;
        }
        copy(in, buffer);
        return buffer;
    }

    void read_into(int64_t i, int64_t h, A* out) const { copy(at(i, h), out); }

    // Of a tensor whose channels are contiguous; past the caches, if a row consists of whole cache lines.
    void write(int64_t i, int64_t h, const A* row, bool past_caches) const {
        S* out = at(i, h);
        if (past_caches) {
            constexpr int64_t per_line = kCacheLine / int64_t(sizeof(S));
            for (int64_t d = 0; d < dim; d += per_line) {
                alignas(kCacheLine) S line[per_line];
                for (int64_t k = 0; k < per_line; k += 8) narrow8(row + d + k, line + k);
                stream_line(line, out + d);
            }
        } else {
            for (int64_t d = 0; d < dim; d += 8) narrow8(row + d, out + d);
        }
    }

    void clear(int64_t i, int64_t h) const { std::memset(at(i, h), 0, dim * sizeof(S)); }

    TRITONKERN_INLINE void prefetch(int64_t i, int64_t h) const {
        const S* row = at(i, h);
        for (int64_t d = 0; d < dim; d += kCacheLine / int64_t(sizeof(S))) __builtin_prefetch(row + d, 0, 3);
    }

  private:
    S* at(int64_t i, int64_t h) const { return data + i / width * y_stride + i % width * x_stride + h * head_stride; }

    void copy(const S* in, A* out) const {
        if (channel_stride == 1) {
            for (int64_t d = 0; d < dim; d += 8) widen8(in + d, out + d);
        } else {
            for (int64_t d = 0; d < dim; ++d) out[d] = widen(in[d * channel_stride]);
        }
        for (int64_t d = dim; d % kLanes<A>; ++d) out[d] = 0;
    }

    S* data;
    int64_t y_stride, x_stride, head_stride, channel_stride, width, dim;
};

// Whether a result is so large that it leaves the caches before it is read. It is then written past them, in whole cache
// lines, because an ordinary write of a line that is not in a cache reads it first.
template <class S>
inline bool worth_streaming(const TensorView& result, int64_t rows, int64_t dim) {
    constexpr int64_t large = 32 << 20;
    const int64_t row = dim * int64_t(sizeof(S));
    return row % kCacheLine == 0 && reinterpret_cast<uintptr_t>(result.data) % kCacheLine == 0 && rows * row >= large;
}

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
