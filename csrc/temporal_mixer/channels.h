// The arithmetic of one vector of channels: both convolutions, the four channels j between them, and GELU.
#pragma once

#include "common/simd.h"
#include "temporal_mixer/call.h"

namespace tritonkern::TRITONKERN_ISA::temporal_mixer {

constexpr int kMultiplier = 4, kTaps = 3;

// The parameters of a vector of channels, in the order in which the loops use them.
template <class A>
struct Weights {
    static constexpr int L = kLanes<A>;
    A norm[L], conv1[kMultiplier][kTaps][L], bias1[kMultiplier][L], conv2[kMultiplier][kTaps][L], bias2[L];
};

// Channel c of the parameters in its vector and lane; bias2 is the sum of the four biases.
template <class A>
void load_weights(const TemporalMixer& call, int64_t c, Weights<A>& w) {
    const auto as = [](const void* p) { return static_cast<const A*>(p); };
    const int64_t lane = c % kLanes<A>;
    w.norm[lane] = as(call.norm_weight)[c];
    for (int j = 0; j < kMultiplier; ++j) {
        const int64_t from = c * kMultiplier + j;
        for (int k = 0; k < kTaps; ++k) {
            w.conv1[j][k][lane] = as(call.conv1_weight)[from * kTaps + k];
            w.conv2[j][k][lane] = as(call.conv2_weight)[from * kTaps + k];
        }
        w.bias1[j][lane] = as(call.conv1_bias)[from];
        if (call.conv2_bias) w.bias2[lane] += as(call.conv2_bias)[from];
    }
}

// gelu(u) = u * value with value = sigmoid(z) and z = 2 sqrt(2 / pi) (u + 0.044715 u^3), which is the tanh form without its
// cancellation. `rest` is 1 - value, as exact where it is small.
template <class A>
struct Gate {
    static constexpr A kTwice = A(1.5957691216057307117597842L), kCubic = A(0.044715L) * kTwice;
    Vec<A> value, rest;

    TRITONKERN_INLINE Gate(Vec<A> u, Vec<A> square) {
        constexpr A largest = sizeof(A) == 4 ? A(87) : A(708);
        const Vec<A> minus_z = u * (square * -kCubic - kTwice);
        const Vec<A> power = exp<A>(minus_z > largest ? broadcast(largest) : minus_z);
        value = A(1) / (A(1) + power), rest = power * value;
    }
};

// u[j] = bias1[j] + sum over k of conv1[j, k] h[k]
template <class A>
TRITONKERN_INLINE Vec<A> inner(const Weights<A>& w, int j, const Vec<A> (&h)[kTaps]) {
    Vec<A> u = load(w.bias1[j]);
    TRITONKERN_UNROLL
    for (int k = 0; k < kTaps; ++k) u += load(w.conv1[j][k]) * h[k];
    return u;
}

// What one frame of v adds to the three frames of the result that see it: to[k] = sum over j of conv2[j, k] v[j].
template <class A>
TRITONKERN_INLINE void spread(const Weights<A>& w, const Vec<A> (&v)[kMultiplier], Vec<A> (&to)[kTaps]) {
    TRITONKERN_UNROLL
    for (int k = 0; k < kTaps; ++k) {
        to[k] = load(w.conv2[0][k]) * v[0];
        TRITONKERN_UNROLL
        for (int j = 1; j < kMultiplier; ++j) to[k] += load(w.conv2[j][k]) * v[j];
    }
}

// `count` interleaved groups of four as four vectors, and back.
template <class A>
void load_hidden(const A* from, int64_t count, Vec<A> (&v)[kMultiplier]) {
    A lanes[kMultiplier][kLanes<A>] = {};
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < kMultiplier; ++j) lanes[j][i] = from[i * kMultiplier + j];
    for (int j = 0; j < kMultiplier; ++j) v[j] = load(lanes[j]);
}
template <class A>
void store_hidden(const Vec<A> (&v)[kMultiplier], int64_t count, A* to) {
    A lanes[kMultiplier][kLanes<A>];
    for (int j = 0; j < kMultiplier; ++j) store(lanes[j], v[j]);
    for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < kMultiplier; ++j) to[i * kMultiplier + j] = lanes[j][i];
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_mixer
