// The largest errors of exp and log of csrc/common/simd.h, in ulps of the result: every argument of float with "all", every 9973rd
// without; of double always a sample. The judges are libm's functions in the next wider type.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/simd.h"

namespace simd = tritonkern::TRITONKERN_ISA;

template <class A, class Wide>
double error(A found, Wide exact) {
    if (std::isnan(exact)) return std::isnan(found) ? 0 : INFINITY;
    if (found == A(exact))
        return double(std::fabs(Wide(found) - exact) /
                      (std::nextafter(std::fabs(found), A(INFINITY)) - std::fabs(found) + Wide(1e-300)));
    int exponent;
    std::frexp(exact, &exponent);
    return double(std::fabs(Wide(found) - exact) / std::ldexp(Wide(1), exponent - std::numeric_limits<A>::digits));
}

template <class A, class Bits, class Function, class Judge>
double largest_error(Bits first, Bits last, Bits step, Function function, Judge judge) {
    constexpr int L = simd::kLanes<A>;
    double largest = 0;
    for (Bits bits = first; bits <= last && bits >= first;) {
        A x[L], y[L];
        for (int l = 0; l < L; ++l, bits += step) {
            const Bits own = std::min(bits, last);
            std::memcpy(&x[l], &own, sizeof(A));
        }
        simd::store(y, function(simd::load(x)));
        for (int l = 0; l < L; ++l) largest = std::max(largest, error(y[l], judge(x[l])));
    }
    return largest;
}

template <class A, class Bits>
Bits bits_of(A x) {
    Bits bits;
    std::memcpy(&bits, &x, sizeof(A));
    return bits;
}

template <class A, class Wide, class Bits>
void measure(const char* name, Bits step) {
    const auto exp = [](simd::Vec<A> x) { return simd::exp<A>(x); };
    const auto log = [](simd::Vec<A> x) { return simd::log<A>(x); };
    const auto bits = [](A x) { return bits_of<A, Bits>(x); };
    const auto exp_of = [](A x) { return std::exp(Wide(x)); };
    const auto log_of = [](A x) { return std::log(Wide(x)); };
    const A top = sizeof(A) == 4 ? 88 : 709, bottom = std::log(Wide(std::numeric_limits<A>::min()));
    const double up = largest_error<A>(Bits(0), bits(std::nextafter(top, A(0))), step, exp, exp_of);
    const double down = largest_error<A>(bits(A(-0.0)), bits(std::nextafter(bottom, A(0))), step, exp, exp_of);
    const double logarithm =
        largest_error<A>(bits(std::numeric_limits<A>::min()), bits(std::numeric_limits<A>::max()), step, log, log_of);
    std::printf("%s exp %.3f log %.3f", name, std::max(up, down), logarithm);

    const A infinity = std::numeric_limits<A>::infinity();
    const A given[] = {A(0), A(-0.0), -infinity, A(NAN), bottom * 2};
    const A powers[] = {1, 1, 0, A(NAN), 0}, logarithms[] = {-infinity, -infinity, -infinity, A(NAN), -infinity};
    int wrong = 0;
    for (int i = 0; i < 5; ++i) {
        const A e = simd::exp<A>(simd::broadcast(given[i]))[0], l = simd::log<A>(simd::broadcast(given[i]))[0];
        wrong += !(e == powers[i] || (std::isnan(e) && std::isnan(powers[i])));
        wrong += i != 2 && i != 4 && !(l == logarithms[i] || (std::isnan(l) && std::isnan(logarithms[i])));
    }
    std::printf(" edges wrong %d\n", wrong);
}

int main(int count, char** arguments) {
    const bool all = count > 1 && std::strcmp(arguments[1], "all") == 0;
    measure<float, double, uint32_t>("float", all ? 1 : 9973);
    measure<double, long double, uint64_t>("double", uint64_t(1) << 43 | 12345678901);
}
