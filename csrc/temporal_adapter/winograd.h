// Winograd's minimal algorithms for a kernel of 3 taps, along one axis; two axes apply them twice.
//
//   y = A^T [ (G g) * (B^T d) ]     m results y, 3 taps g, n = m + 2 inputs d, n products instead of 3 m
//
// They evaluate the polynomials d and g at n - 1 points and at infinity, multiply there, and interpolate. Tiles of 4 save
// more (4 of 9 products remain, tiles of 2: 16 of 36) but lose accuracy where the points are far apart or close together;
// 0, +-3/4, +-3/2 were measured to be best by a factor of 3 over the usual 0, +-1, +-2.
#pragma once

#include "common/simd.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {

template <class A, int m>
struct Winograd;

template <class A>
struct Winograd<A, 2> {
    static constexpr int n = 4;
    using V = Vec<A>;

    static TRITONKERN_INLINE void input(const V (&d)[4], V (&v)[4]) {  // B^T d
        v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
    }
    static TRITONKERN_INLINE void weight(const V (&g)[3], V (&u)[4]) {  // G g
        const V even = (g[0] + g[2]) * A(0.5), odd = g[1] * A(0.5);
        u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
    }
    static TRITONKERN_INLINE void output(const V (&p)[4], V (&y)[2]) {  // A^T p
        y[0] = p[0] + p[1] + p[2];
        y[1] = p[1] - p[2] - p[3];
    }
    static TRITONKERN_INLINE void grad_output(const V (&y)[2], V (&p)[4]) {  // A y
        p[0] = y[0], p[1] = y[0] + y[1], p[2] = y[0] - y[1], p[3] = -y[1];
    }
    static TRITONKERN_INLINE void grad_weight(const V (&u)[4], V (&g)[3]) {  // G^T u
        const V even = (u[1] + u[2]) * A(0.5);
        g[0] = u[0] + even, g[1] = (u[1] - u[2]) * A(0.5), g[2] = even + u[3];
    }
};

template <class A>
struct Winograd<A, 4> {
    static constexpr int n = 6;
    using V = Vec<A>;
    static constexpr A a = A(0.75), b = A(1.5), a2 = a * a, b2 = b * b;
    // Inverses of the products of the distances of 0, a and b from the other points.
    static constexpr A at_0 = A(1 / (0.5625L * 2.25L)), at_a = A(1 / (2 * 0.5625L * (0.5625L - 2.25L)));
    static constexpr A at_b = A(1 / (2 * 2.25L * (2.25L - 0.5625L)));

    static TRITONKERN_INLINE void input(const V (&d)[6], V (&v)[6]) {
        const V even_a = d[4] - d[2] * b2, odd_a = (d[3] - d[1] * b2) * a;
        const V even_b = d[4] - d[2] * a2, odd_b = (d[3] - d[1] * a2) * b;
        v[0] = d[0] * (a2 * b2) - d[2] * (a2 + b2) + d[4];
        v[1] = even_a + odd_a, v[2] = even_a - odd_a, v[3] = even_b + odd_b, v[4] = even_b - odd_b;
        v[5] = d[1] * (a2 * b2) - d[3] * (a2 + b2) + d[5];
    }
    static TRITONKERN_INLINE void weight(const V (&g)[3], V (&u)[6]) {
        const V even_a = (g[0] + g[2] * a2) * at_a, odd_a = g[1] * (a * at_a);
        const V even_b = (g[0] + g[2] * b2) * at_b, odd_b = g[1] * (b * at_b);
        u[0] = g[0] * at_0, u[1] = even_a + odd_a, u[2] = even_a - odd_a;
        u[3] = even_b + odd_b, u[4] = even_b - odd_b, u[5] = g[2];
    }
    static TRITONKERN_INLINE void output(const V (&p)[6], V (&y)[4]) {
        const V even_a = p[1] + p[2], odd_a = (p[1] - p[2]) * a, even_b = p[3] + p[4], odd_b = (p[3] - p[4]) * b;
        y[0] = p[0] + even_a + even_b;
        y[1] = odd_a + odd_b;
        y[2] = even_a * a2 + even_b * b2;
        y[3] = odd_a * a2 + odd_b * b2 + p[5];
    }
    static TRITONKERN_INLINE void grad_output(const V (&y)[4], V (&p)[6]) {
        const V even_a = y[0] + y[2] * a2, odd_a = (y[1] + y[3] * a2) * a;
        const V even_b = y[0] + y[2] * b2, odd_b = (y[1] + y[3] * b2) * b;
        p[0] = y[0], p[1] = even_a + odd_a, p[2] = even_a - odd_a;
        p[3] = even_b + odd_b, p[4] = even_b - odd_b, p[5] = y[3];
    }
    static TRITONKERN_INLINE void grad_weight(const V (&u)[6], V (&g)[3]) {
        const V even_a = (u[1] + u[2]) * at_a, even_b = (u[3] + u[4]) * at_b;
        g[0] = u[0] * at_0 + even_a + even_b;
        g[1] = (u[1] - u[2]) * (a * at_a) + (u[3] - u[4]) * (b * at_b);
        g[2] = even_a * a2 + even_b * b2 + u[5];
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
