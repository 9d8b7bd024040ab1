// Local correlation on the CPU: the features at (2 radius + 1)^2 bilinear samples around each point times the point's supports.
//
//   position -> lattice    the (2 radius + 2)^2 cells that enclose all samples, and two fractions (lattice.h)
//            -> product    cells x supports: the only sums over channels (products.h)
//            -> samples    interpolated between the products at four cells, one plane of supports per sample
//            -> weights    where asked for: their softmax over the samples (softmax.h)
//
// Interpolation and product are both linear, so their order can be exchanged: sampled vectors of features are never made, and
// 64 products of vectors give 49 interpolated ones. Lanes are supports, packed once for the frames of a point; a cell's channels
// are read in place. The gradients take the same steps in reverse.
#include "local_correlation/backward.h"
#include "local_correlation/linear.h"

namespace tritonkern::TRITONKERN_ISA::local_correlation {
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

void forward(const LocalCorrelation& call) {
    run<Forward>(call);
}

void backward(const LocalCorrelation& call) {
    run<Backward>(call);
}

void multiply(const LocalCorrelationProduct& call) {
    if (call.dtype == DType::kFloat64) return Product<double>(call).run();
    Product<float>(call).run();
}

void softmax_backward(const LocalCorrelationSoftmax& call) {
    if (call.dtype == DType::kFloat64) return softmax_gradients<double>(call);
    softmax_gradients<float>(call);
}

}  // namespace tritonkern::TRITONKERN_ISA::local_correlation
