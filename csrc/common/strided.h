// Sequences inside strided [B, T, N, H, D] tensors, and rows brought into the shape that vector code wants.
#pragma once

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace tritonkern::TRITONKERN_ISA {

// Rows of one sequence, ready for vector loads: contiguous, readable up to the head dim rounded up to whole vectors.
template <class A>
struct Rows {
    const A* data;
    int64_t stride;

    const A* operator[](int64_t i) const { return data + i * stride; }
};

// The frames of one (b, n, h): T rows of D elements, anywhere in memory.
template <class S>
struct Sequence {
    using A = Accumulator<S>;

    S* data;
    int64_t time_stride, channel_stride, dim;

    Sequence(const TensorView& tensor, int64_t dim, int64_t b, int64_t n, int64_t h)
        : data(static_cast<S*>(tensor.data) + b * tensor.stride[0] + n * tensor.stride[2] + h * tensor.stride[3]),
          time_stride(tensor.stride[1]),
          channel_stride(tensor.stride[4]),
          dim(dim) {}

    S* row(int64_t t) const { return data + t * time_stride; }

    bool usable_in_place() const { return std::is_same_v<S, A> && channel_stride == 1 && dim % kLanes<A> == 0; }

    // Frames [first, last) as rows of A: in place, or copied into `scratch` ((last - first) * round_up(dim,
    // lanes)).
    Rows<A> rows(int64_t first, int64_t last, A* scratch) const {
        if constexpr (std::is_same_v<S, A>) {
            if (usable_in_place()) return {data + first * time_stride, time_stride};
        }
        copy_rows(first, last, scratch);
        return {scratch, round_up(dim, kLanes<A>)};
    }

    // As `rows`, always copied.
    void copy_rows(int64_t first, int64_t last, A* scratch) const {
        const int64_t padded = round_up(dim, kLanes<A>);
        for (int64_t t = first; t < last; ++t) {
            const S* in = data + t * time_stride;
            A* out = scratch + (t - first) * padded;
            if (channel_stride == 1) {
                for (int64_t d = 0; d < dim; d += 8) widen8(in + d, out + d);
            } else {
                for (int64_t d = 0; d < dim; ++d) out[d] = widen(in[d * channel_stride]);
            }
            for (int64_t d = dim; d < padded; ++d) out[d] = 0;
        }
    }

    // Writes frame t of a tensor whose channels are contiguous; past the caches, if it consists of whole cache lines.
    void write(int64_t t, const A* row, bool past_caches) const {
        S* out = data + t * time_stride;
        if (past_caches) {
            constexpr int64_t per_line = kCacheLine / int64_t(sizeof(S));
            for (int64_t d = 0; d < dim; d += per_line) {
                alignas(kCacheLine) S line[per_line];
                for (int64_t i = 0; i < per_line; i += 8) narrow8(row + d + i, line + i);
                stream_line(line, out + d);
            }
        } else {
            for (int64_t d = 0; d < dim; d += 8) narrow8(row + d, out + d);
        }
    }
};

// columns[d * stride + t] = rows[t][d] for t < count and d < dim rounded up to whole vectors. `stride` is at least
// count rounded up to whole vectors; the columns beyond count repeat the last row.
template <class A>
inline void transpose_rows(Rows<A> rows, int64_t count, int64_t dim, A* columns, int64_t stride) {
    constexpr int L = kLanes<A>;
    const auto tiles = [&](int64_t t, const auto& row) __attribute__((always_inline)) {
        for (int64_t d = 0; d < dim; d += L) {
            Vec<A> tile[L];
            TRITONKERN_UNROLL
            for (int i = 0; i < L; ++i) tile[i] = load(row(i) + d);
            transpose<A>(tile);
            TRITONKERN_UNROLL
            for (int i = 0; i < L; ++i) store(columns + (d + i) * stride + t, tile[i]);
        }
    };
    int64_t t = 0;
    for (; t + L <= count; t += L) tiles(t, [&](int i) { return rows[t] + i * rows.stride; });
    if (t < count) tiles(t, [&](int i) { return rows[min(t + i, count - 1)]; });
}

}  // namespace tritonkern::TRITONKERN_ISA
