// The softmax over the samples p of every support s, and its gradient, in place on rows of P * S adjacent numbers.
//   weights[p, s] = exp(scale (z[p, s] - maximum[s])) / sum over p of the same
//   grad_z[p, s]  = scale weights[p, s] (grad[p, s] - sum over p of weights[p, s] grad[p, s])
// Lanes are supports. A NaN or +infinity makes all weights of its support NaN, as their sum is.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "local_correlation/call.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {

// Vectors of supports s, s + 1, ... of the P places of a row. The last vector may have fewer lanes; the others belong to the next
// place, where there is one, and are not written.
template <class A>
struct Column {
    static constexpr int64_t L = kLanes<A>;
    const int64_t S, lanes, whole;  // whole: places of which a whole vector can be read

    Column(int64_t P, int64_t S, int64_t s)
        : S(S), lanes(min<int64_t>(L, S - s)), whole(P * S < s + L ? 0 : min(P, (P * S - s - L) / S + 1)) {}

    TRITONKERN_INLINE Vec<A> read(const A* column, int64_t p) const {
        if (p < whole) return load(column + p * S);
        A part[L] = {};
        for (int64_t i = 0; i < lanes; ++i) part[i] = column[p * S + i];
        return load(part);
    }

    TRITONKERN_INLINE void write(A* column, int64_t p, Vec<A> value) const {
        if (lanes == L) return store(column + p * S, value);
        for (int64_t i = 0; i < lanes; ++i) column[p * S + i] = value[i];
    }
};

template <class A>
inline void softmax(A* z, int64_t P, int64_t S, A scale) {
    for (int64_t s = 0; s < S; s += kLanes<A>, z += kLanes<A>) {
        const Column<A> column(P, S, s);
        Vec<A> maximum = column.read(z, 0), sum = {};
        for (int64_t p = 1; p < P; ++p) maximum = Maximum{}(maximum, column.read(z, p));
        for (int64_t p = 0; p < P; ++p) {
            const Vec<A> power = exp<A>(scale * (column.read(z, p) - maximum));
            column.write(z, p, power);
            sum += power;
        }
        const Vec<A> factor = 1 / sum;
        for (int64_t p = 0; p < P; ++p) column.write(z, p, column.read(z, p) * factor);
    }
}

template <class A>
inline void softmax_gradient(const A* weights, A* grad, int64_t P, int64_t S, A scale) {
    for (int64_t s = 0; s < S; s += kLanes<A>, weights += kLanes<A>, grad += kLanes<A>) {
        const Column<A> column(P, S, s);
        Vec<A> mean = {};
        for (int64_t p = 0; p < P; ++p) mean += column.read(weights, p) * column.read(grad, p);
        for (int64_t p = 0; p < P; ++p)
            column.write(grad, p, scale * column.read(weights, p) * (column.read(grad, p) - mean));
    }
}

template <class A>
inline void softmax_gradients(const LocalCorrelationSoftmax& call) {
    const int64_t length = call.P * call.S;
    parallel_for(call.rows, 16, call.num_threads, 0, [&](int64_t first, int64_t last, Arena) {
        for (int64_t row = first; row < last; ++row)
            softmax_gradient(static_cast<const A*>(call.weights.data) + row * length,
                             static_cast<A*>(call.grad.data) + row * length, call.P, call.S, A(call.scale));
    });
}

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
