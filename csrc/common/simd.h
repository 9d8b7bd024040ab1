// One vector type for every instruction set, made of the vector extensions that GCC and clang share.
//
// A kernel file is compiled once per instruction set, each time with other -m flags, another TRITONKERN_VECTOR_BYTES
// and another namespace TRITONKERN_ISA. Everything here lives inside that namespace: two copies of one inline function
// with the same mangled name would be merged by the linker, and AVX-512 code would run on a machine that has none.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

namespace tritonkern::TRITONKERN_ISA {

#define TRITONKERN_INLINE inline __attribute__((always_inline))
// Arrays of vectors become registers only when the loops over them are unrolled.
#ifdef __clang__
#define TRITONKERN_UNROLL _Pragma("unroll")
#else
#define TRITONKERN_UNROLL _Pragma("GCC unroll 16")
#endif

template <class A>
struct VecTypes {
    using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
    typedef A Vec __attribute__((vector_size(TRITONKERN_VECTOR_BYTES)));
    typedef Integer IntVec __attribute__((vector_size(TRITONKERN_VECTOR_BYTES)));
    typedef A Unaligned __attribute__((vector_size(TRITONKERN_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vec = typename VecTypes<A>::Vec;
template <class A>
using IntVec = typename VecTypes<A>::IntVec;
template <class A>
constexpr int kLanes = TRITONKERN_VECTOR_BYTES / int(sizeof(A));

template <class A>
TRITONKERN_INLINE Vec<A> load(const A* p) {
    return *reinterpret_cast<const typename VecTypes<A>::Unaligned*>(p);
}

template <class A>
TRITONKERN_INLINE void store(A* p, Vec<A> v) {
    *reinterpret_cast<typename VecTypes<A>::Unaligned*>(p) = v;
}

template <class A>
TRITONKERN_INLINE Vec<A> broadcast(A x) {
    return x - Vec<A>{};  // x - 0 keeps the sign of -0, which 0 + x would not
}

namespace detail {

// Lane l of the result is lane index(l) of the 2L lanes (a, b).
template <class A, class Index, int... I>
TRITONKERN_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b, Index index, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Index{}(I)...);
#else
    return __builtin_shuffle(a, b, IntVec<A>{index(I)...});
#endif
}

template <int L, int S>
struct Swap {  // exchanges lanes whose number differs in the bit S
    constexpr int operator()(int l) const { return l ^ S; }
};
template <int L, int S>
struct KeepLow {
    constexpr int operator()(int l) const { return l & S ? L + l - S : l; }
};
template <int L, int S>
struct KeepHigh {
    constexpr int operator()(int l) const { return l & S ? L + l : l + S; }
};

template <class A, template <int, int> class Index, int S>
TRITONKERN_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b) {
    constexpr int L = kLanes<A>;
    return shuffle<A>(a, b, Index<L, S>{}, std::make_integer_sequence<int, L>{});
}

}  // namespace detail

// Reductions over the lanes; every lane of the result holds it. The order is fixed, so that sums are reproducible.
template <class A, int S = kLanes<A> / 2>
TRITONKERN_INLINE Vec<A> lane_sum(Vec<A> v) {
    v += detail::shuffle<A, detail::Swap, S>(v, v);
    if constexpr (S > 1) return lane_sum<A, S / 2>(v);
    return v;
}

// NaN lanes may be lost: callers let NaN through by another way.
template <class A, int S = kLanes<A> / 2>
TRITONKERN_INLINE Vec<A> lane_max(Vec<A> v) {
    const Vec<A> w = detail::shuffle<A, detail::Swap, S>(v, v);
    v = w > v ? w : v;
    if constexpr (S > 1) return lane_max<A, S / 2>(v);
    return v;
}

// In-place transpose of an L x L tile: stage S swaps bit S of the row number with bit S of the lane number.
template <class A, int S = 1>
TRITONKERN_INLINE void transpose(Vec<A> (&tile)[kLanes<A>]) {
    constexpr int L = kLanes<A>;
    TRITONKERN_UNROLL
    for (int r = 0; r < L; ++r) {
        if (r & S) continue;
        const Vec<A> low = tile[r], high = tile[r | S];
        tile[r] = detail::shuffle<A, detail::KeepLow, S>(low, high);
        tile[r | S] = detail::shuffle<A, detail::KeepHigh, S>(low, high);
    }
    if constexpr (2 * S < L) transpose<A, 2 * S>(tile);
}

// e^x to about one ulp for x below the overflow threshold. Results under the smallest normal number are 0; NaN stays
// NaN.
//   e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln(2)/2, where the Taylor series of e^r is short.
template <class A>
TRITONKERN_INLINE Vec<A> exp(Vec<A> x) {
    constexpr bool single = sizeof(A) == 4;
    constexpr A log2_e = A(1.4426950408889634074L);
    // The high part has enough trailing zero bits for n * high to be exact.
    constexpr A ln2_high = single ? A(0.693359375) : A(6.93147180369123816490e-01);
    constexpr A ln2_low = single ? A(-2.12194440054690583e-4) : A(1.90821492927058770002e-10);
    constexpr int mantissa_bits = single ? 23 : 52, bias = single ? 127 : 1023, degree = single ? 7 : 13;
    // Adding 1.5 * 2^mantissa_bits rounds to an integer, which then stands in the lowest bits; with the exponent's bias
    // added as well, a shift turns those bits into the floating-point number 2^n.
    constexpr A shifter = A(int64_t(3) << (mantissa_bits - 1)) + bias;
    constexpr A smallest = A((1 - bias) * 0.693147180559945309L);

    const Vec<A> clamped = x < smallest ? broadcast(smallest) : x;
    const Vec<A> shifted = clamped * log2_e + shifter;
    const Vec<A> n = shifted - shifter;
    const Vec<A> r = (clamped - n * ln2_high) - n * ln2_low;
    A coefficient = 1;
    for (int k = 2; k <= degree; ++k) coefficient /= A(k);
    Vec<A> series = broadcast(coefficient);
    TRITONKERN_UNROLL
    for (int k = degree; k > 0; --k) {
        coefficient *= A(k);
        series = series * r + coefficient;
    }
    const Vec<A> power = (Vec<A>)((IntVec<A>)shifted << mantissa_bits);
    return x < smallest ? Vec<A>{} : series * power;
}

}  // namespace tritonkern::TRITONKERN_ISA
