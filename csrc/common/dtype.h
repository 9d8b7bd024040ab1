// Storage types and their conversion to and from the type that a kernel computes in: float, or double for double.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/tensor.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace tritonkern::TRITONKERN_ISA {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

template <class S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float widen(float x) {
    return x;
}
inline double widen(double x) {
    return x;
}
inline float widen(BFloat16 x) {
    return from_bits(uint32_t(x.bits) << 16);
}

inline void narrow(float x, float* out) {
    *out = x;
}
inline void narrow(double x, double* out) {
    *out = x;
}

// Round to nearest, ties to even. A NaN stays one: rounding could carry it into the exponent and make it infinite or
// zero.
inline void narrow(float x, BFloat16* out) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

#ifdef __F16C__
inline float widen(Float16 x) {
    return _cvtsh_ss(x.bits);
}
inline void narrow(float x, Float16* out) {
    out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Without conversion instructions: move the bits, then let a multiplication by a power of two correct the exponent,
// which also turns subnormal halves into normal floats.
inline float widen(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    const bool special = magnitude >= 0x7c00u;  // infinity or NaN
    const uint32_t normal = to_bits(float(magnitude & 0x3ffu) * 0x1p-24f);
    const uint32_t bits = magnitude < 0x400u ? normal : (magnitude << 13) + (special ? 0x70000000u : 0x38000000u);
    return from_bits(sign | bits);
}

inline void narrow(float x, Float16* out) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    // Subnormal halves: adding 0.5 makes the float adder round at the half's last place, 2^-24.
    const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    out->bits = uint16_t(sign | half);
}
#endif

#ifdef __F16C__
// Compilers do not vectorise the scalar conversion, so that eight at a time are spelt out.
inline void widen8(const Float16* in, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
}
inline void narrow8(const float* in, Float16* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT));
}
#endif
template <class S>
inline void widen8(const S* in, Accumulator<S>* out) {
    for (int i = 0; i < 8; ++i) out[i] = widen(in[i]);
}
template <class S>
inline void narrow8(const Accumulator<S>* in, S* out) {
    for (int i = 0; i < 8; ++i) narrow(in[i], &out[i]);
}

// run(S{}) with the storage type S of a floating-point tensor.
template <class Run>
void for_dtype(DType dtype, const Run& run) {
    if (dtype == DType::kFloat64) return run(double{});
    if (dtype == DType::kFloat32) return run(float{});
    if (dtype == DType::kBFloat16) return run(BFloat16{});
    if (dtype == DType::kFloat16) return run(Float16{});
}

}  // namespace tritonkern::TRITONKERN_ISA
