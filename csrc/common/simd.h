// One vector type for every instruction set, made of the vector extensions that GCC and clang share.
//
// A kernel file is compiled once per instruction set, each time with other -m flags, another TRITONKERN_VECTOR_BYTES
// and another namespace TRITONKERN_ISA. Everything here lives inside that namespace: two copies of one inline function
// with the same mangled name would be merged by the linker, and AVX-512 code would run on a machine that has none.
#pragma once

#include <cstdint>
#include <limits>
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
    using Unsigned = std::make_unsigned_t<Integer>;
    typedef Integer IntVec __attribute__((vector_size(TRITONKERN_VECTOR_BYTES)));
    typedef Unsigned BitsVec __attribute__((vector_size(TRITONKERN_VECTOR_BYTES)));  // overflow is defined
    typedef A Unaligned __attribute__((vector_size(TRITONKERN_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};
template <class A>
using Vec = typename VecTypes<A>::Vec;
template <class A>
using IntVec = typename VecTypes<A>::IntVec;
template <class A>
using BitsVec = typename VecTypes<A>::BitsVec;
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

// All bits set in the lanes whose marks are not 0.
template <class A>
TRITONKERN_INLINE IntVec<A> load_mask(const typename VecTypes<A>::Integer* p) {
    typedef typename VecTypes<A>::Integer Unaligned
        __attribute__((vector_size(TRITONKERN_VECTOR_BYTES), aligned(sizeof(A)), may_alias));
    return *reinterpret_cast<const Unaligned*>(p) < 0;
}

template <class A>
TRITONKERN_INLINE Vec<A> broadcast(A x) {
    return x - Vec<A>{};  // x - 0 keeps the sign of -0, which 0 + x would not
}

namespace detail {

// Lane l of the result is lane Index{}(l) of the 2L lanes (a, b).
template <class A, class Index, int... I>
TRITONKERN_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Index{}(I)...);
#else
    return __builtin_shuffle(a, b, IntVec<A>{Index{}(I)...});
#endif
}

// Which of the 2L lanes (a, b) goes to lane l; S is a power of two.
template <int L, int S>
struct Swap {  // exchanges the lanes of a whose numbers differ in the bit S
    constexpr int operator()(int l) const { return l ^ S; }
};
template <int L, int S>
struct KeepLow {  // the lanes without bit S, of a and then of b
    constexpr int operator()(int l) const { return l & S ? L + l - S : l; }
};
template <int L, int S>
struct KeepHigh {  // the lanes with bit S, of a and then of b
    constexpr int operator()(int l) const { return l & S ? L + l : l + S; }
};
// The low (S = 0) or high (S = 2) halves of every four lanes of a and b, interleaved: one instruction on x86.
template <int L, int S>
struct Unpack {
    constexpr int operator()(int l) const { return (l & 1) * L + l / 4 * 4 + S + l % 4 / 2; }
};

template <class A, template <int, int> class Index, int S>
TRITONKERN_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b) {
    constexpr int L = kLanes<A>;
    return shuffle<A, Index<L, S>>(a, b, std::make_integer_sequence<int, L>{});
}

}  // namespace detail

// Transposes an L x L tile. Every round exchanges one bit of the row number with one bit of the lane number, for all pairs of
// rows that differ in that bit. The first round of floats interleaves instead, as that costs half as many instructions: it
// leaves lane bits 0 and 1 exchanged, which come out as row bits 0 and 1 at the end.
template <class A, int Bit = 1>
TRITONKERN_INLINE void transpose(Vec<A> (&tile)[kLanes<A>]) {
    constexpr int L = kLanes<A>;
    constexpr bool interleave = Bit == 1 && sizeof(A) == 4;
    TRITONKERN_UNROLL
    for (int r = 0; r < L; ++r) {
        if (r & Bit) continue;
        const Vec<A> low = tile[r], high = tile[r | Bit];
        if constexpr (interleave) {
            tile[r] = detail::shuffle<A, detail::Unpack, 0>(low, high);
            tile[r | Bit] = detail::shuffle<A, detail::Unpack, 2>(low, high);
        } else {
            tile[r] = detail::shuffle<A, detail::KeepLow, Bit>(low, high);
            tile[r | Bit] = detail::shuffle<A, detail::KeepHigh, Bit>(low, high);
        }
    }
    if constexpr (2 * Bit < L) transpose<A, 2 * Bit>(tile);
    if constexpr (interleave) {
        TRITONKERN_UNROLL
        for (int r = 0; r < L; r += 4) std::swap(tile[r + 1], tile[r + 2]);
    }
}

struct Sum {
    template <class V>
    V operator()(V a, V b) const {
        return a + b;
    }
};
struct Maximum {  // NaN may be lost: callers let it through by another way
    template <class V>
    V operator()(V a, V b) const {
        return b > a ? b : a;
    }
};

namespace detail {
template <class A, int S, class Op>
TRITONKERN_INLINE Vec<A> fold(Vec<A> v, Op op) {
    if constexpr (S > 0) {
        return fold<A, S / 2>(op(v, shuffle<A, Swap, S>(v, v)), op);
    } else {
        return v;
    }
}
}  // namespace detail

// out[r] = op over all lanes of rows[r]. The order is fixed, so that sums are reproducible.
template <class A, class Op>
TRITONKERN_INLINE void reduce(const Vec<A> (&rows)[4], Op op, A* out) {
    constexpr int L = kLanes<A>;
    if constexpr (L < 4) {
        for (int r = 0; r < 4; ++r) out[r] = detail::fold<A, L / 2>(rows[r], op)[0];
    } else {
        // Four reductions in one: halves of two rows share a vector, then quarters of four.
        using detail::KeepHigh, detail::KeepLow, detail::shuffle;
        const auto merge = [&](Vec<A> a, Vec<A> b, auto bit) __attribute__((always_inline)) {
            return op(shuffle<A, KeepLow, bit>(a, b), shuffle<A, KeepHigh, bit>(a, b));
        };
        const std::integral_constant<int, L / 2> half;
        const std::integral_constant<int, L / 4> quarter;
        const Vec<A> all = merge(merge(rows[0], rows[1], half), merge(rows[2], rows[3], half), quarter);
        A lanes[L];
        store(lanes, detail::fold<A, L / 8>(all, op));
        for (int r = 0; r < 4; ++r) out[r] = lanes[r % 2 * half + r / 2 * quarter];
    }
}

// e^x within two ulps for x up to 88 (709 in double); infinity from just above on. Results under the smallest normal
// number are 0; NaN stays NaN.
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

    const Vec<A> shifted = x * log2_e + shifter;
    const Vec<A> n = shifted - shifter;
    const Vec<A> r = (x - n * ln2_high) - n * ln2_low;
    A coefficient = 1;
    for (int k = 2; k <= degree; ++k) coefficient /= A(k);
    Vec<A> series = broadcast(coefficient);
    TRITONKERN_UNROLL
    for (int k = degree; k > 0; --k) {
        coefficient *= A(k);
        series = series * r + coefficient;
    }
    const Vec<A> power = (Vec<A>)((BitsVec<A>)shifted << mantissa_bits);
    // Below, and for -inf, whatever the bits say.
    return x < smallest ? Vec<A>{} : series * power;
}

// Natural logarithm within two ulps, for normal positive x; -inf for 0, NaN for NaN.
//   x = 2^n m with m in [sqrt(1/2), sqrt(2));  ln m = 2 atanh((m - 1) / (m + 1)), whose argument is at most 0.172
template <class A>
TRITONKERN_INLINE Vec<A> log(Vec<A> x) {
    constexpr bool single = sizeof(A) == 4;
    using Unsigned = typename VecTypes<A>::Unsigned;
    constexpr int mantissa_bits = single ? 23 : 52, terms = single ? 5 : 11;
    constexpr A ln2 = A(0.693147180559945309L);
    constexpr Unsigned sqrt_half_bits = single ? Unsigned(0x3f3504f3) : Unsigned(0x3fe6a09e667f3bcd);
    const IntVec<A> exponent = (IntVec<A>)((BitsVec<A>)x - sqrt_half_bits) >> mantissa_bits;
    const Vec<A> m = (Vec<A>)((BitsVec<A>)x - ((BitsVec<A>)exponent << mantissa_bits));
    const Vec<A> s = (m - 1) / (m + 1), square = s * s;
    Vec<A> series = broadcast(A(2) / (2 * terms + 1));
    TRITONKERN_UNROLL
    for (int k = terms - 1; k > 0; --k) series = series * square + A(2) / (2 * k + 1);
    const Vec<A> result = __builtin_convertvector(exponent, Vec<A>) * ln2 + (s + s + s * square * series);
    const Vec<A> finite = x > 0 ? result : broadcast(-std::numeric_limits<A>::infinity());
    return x == x ? finite : x;
}

}  // namespace tritonkern::TRITONKERN_ISA
