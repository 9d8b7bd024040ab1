// The arithmetic of one vector of channels of one frame: gate, factor and multiplier of the recurrence.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence {

// The gradient of the square root is 1000 at most, where it would be infinite at 0.
template <class A>
constexpr A kLeastSquare = A(1e-6L);

template <class A>
TRITONKERN_INLINE Vec<A> sqrt(Vec<A> x) {
    Vec<A> root;
    TRITONKERN_UNROLL
    for (int l = 0; l < kLanes<A>; ++l) root[l] = std::sqrt(x[l]);
    return root;
}

template <class A>
TRITONKERN_INLINE Vec<A> sigmoid(Vec<A> x) {
    constexpr A largest = sizeof(A) == 4 ? A(87) : A(708);
    return A(1) / (A(1) + exp<A>(-x > largest ? broadcast(largest) : -x));
}

// 1 - e^x for x <= 0, with e^x in `power`. Near 0, where the difference would lose its digits, by the Taylor series.
template <class A>
TRITONKERN_INLINE Vec<A> one_minus_exp(Vec<A> x, Vec<A> power) {
    constexpr int degree = sizeof(A) == 4 ? 8 : 16;
    A coefficient = 1;  // 1 / degree!
    for (int k = 2; k <= degree; ++k) coefficient /= A(k);
    Vec<A> series = broadcast(coefficient);
    // Invariant: series = 1 / k! + x / (k + 1)! + ...
    TRITONKERN_UNROLL
    for (int k = degree; k > 1; --k) {
        coefficient *= A(k);
        series = series * x + coefficient;
    }
    const Vec<A> far = A(1) - power;
    return x > A(-0.5) ? -x * series : far;
}

// What the recurrence needs beside the gates, of the gate of the decay. `first`: there is no state before.
template <class A>
struct Factors {
    Vec<A> factor, square, rest, multiplier;

    TRITONKERN_INLINE Factors(Vec<A> decay, Vec<A> rate, bool first) {
        const Vec<A> log_factor = rate * decay;
        factor = exp<A>(log_factor), square = factor * factor;
        rest = one_minus_exp<A>(A(2) * log_factor, square);
        multiplier = first ? broadcast(A(1)) : sqrt<A>(rest);
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::gated_linear_recurrence
