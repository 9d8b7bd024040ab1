// Rows of adjacent numbers of any storage type, as numbers of the accumulator's type, and sums over them.
#pragma once

#include "common/dtype.h"
#include "common/simd.h"
#include "common/tensor.h"

namespace tritonkern::TRITONKERN_ISA {

namespace detail {

template <class S>
void read_as(const void* base, int64_t offset, int64_t C, Accumulator<S>* out) {
    const S* in = static_cast<const S*>(base) + offset;
    int64_t c = 0;
    for (; c + 8 <= C; c += 8) widen8(in + c, out + c);
    for (; c < C; ++c) out[c] = widen(in[c]);
}

template <class S>
void write_as(const Accumulator<S>* in, void* base, int64_t offset, int64_t C) {
    S* out = static_cast<S*>(base) + offset;
    int64_t c = 0;
    for (; c + 8 <= C; c += 8) narrow8(in + c, out + c);
    for (; c < C; ++c) narrow(in[c], out + c);
}

}  // namespace detail

// C numbers from `offset` on, a number of elements. Which storage types there are depends on the accumulator.
inline void read_row(DType dtype, const void* base, int64_t offset, int64_t C, float* out) {
    if (dtype == DType::kFloat32) return detail::read_as<float>(base, offset, C, out);
    if (dtype == DType::kBFloat16) return detail::read_as<BFloat16>(base, offset, C, out);
    detail::read_as<Float16>(base, offset, C, out);
}
inline void read_row(DType, const void* base, int64_t offset, int64_t C, double* out) {
    detail::read_as<double>(base, offset, C, out);
}
inline void write_row(DType dtype, const float* in, void* base, int64_t offset, int64_t C) {
    if (dtype == DType::kFloat32) return detail::write_as<float>(in, base, offset, C);
    if (dtype == DType::kBFloat16) return detail::write_as<BFloat16>(in, base, offset, C);
    detail::write_as<Float16>(in, base, offset, C);
}
inline void write_row(DType, const double* in, void* base, int64_t offset, int64_t C) {
    detail::write_as<double>(in, base, offset, C);
}

// Sum of value(c) over whole vectors of a row. Four sums side by side, in an order that depends on the length alone.
template <class A, class Value>
TRITONKERN_INLINE A row_sum(int64_t padded, const Value& value) {
    constexpr int L = kLanes<A>;
    Vec<A> sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * L <= padded; c += 4 * L) {
        TRITONKERN_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] += value(c + i * L);
    }
    for (; c < padded; c += L) sums[0] += value(c);
    return detail::fold<A, L / 2>((sums[0] + sums[1]) + (sums[2] + sums[3]), Sum{})[0];
}

}  // namespace tritonkern::TRITONKERN_ISA
