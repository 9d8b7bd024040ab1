// Writing past the caches.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace tritonkern {

#ifdef TRITONKERN_ISA
namespace TRITONKERN_ISA {

constexpr int64_t kCacheLine = 64;

// Writes one aligned cache line past the caches; `end_of_stream` must follow before another thread may read it.
inline __attribute__((always_inline)) void stream_line(const void* from, void* to) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
#elif defined(__AVX__)
    for (int i = 0; i < 2; ++i)
        _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_load_si256(static_cast<const __m256i*>(from) + i));
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i)
        _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
#else
    std::memcpy(to, from, kCacheLine);
#endif
}

inline void end_of_stream() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

}  // namespace TRITONKERN_ISA
#endif

}  // namespace tritonkern
