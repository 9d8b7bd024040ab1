// Local correlation on the CPU: the features at (2 radius + 1)^2 bilinear samples around each point times the point's supports.
//
//   position -> lattice    the (2 radius + 2)^2 cells between which all samples lie, and two fractions (lattice.h)
//            -> product    cells x supports: the only sums over channels, from registers (products.h)
//            -> samples    between the products at four cells, for each support a plane
//
// Interpolation and product are both linear, so that they may change places: a sampled vector of features never exists, and
// 64 products of vectors give 49 interpolated ones. Lanes are supports, packed once for the frames of a point; a cell's
// channels are read where they lie. The gradients go the same way back.
#include "local_correlation/backward.h"

namespace tritonkern::TRITONKERN_ISA {
namespace {

template <template <class, class> class Kernel>
void run(const LocalCorrelation& call) {
    for_dtype(call.dtype, [&](auto element) {
        using S = decltype(element);
        if (call.rows_dtype == call.dtype)
            Kernel<S, S>(call).run();
        else
            Kernel<S, Accumulator<S>>(call).run();
    });
}

}  // namespace

void local_correlation_forward(const LocalCorrelation& call) {
    run<LocalForward>(call);
}

void local_correlation_backward(const LocalCorrelation& call) {
    run<LocalBackward>(call);
}

}  // namespace tritonkern::TRITONKERN_ISA
