// Correlation with soft-argmax on the CPU: where each query is found in each frame, without a cost volume.
//
//   cost_i = query . feature_i,   point = sum over the disc around the best cell of softmax_i * centre_i
//
// The costs are a matrix product whose result is read once, while it is in the first-level cache:
//
//               queries ->
//   cells   | 6 x 16 sums |      lanes are queries, so that maximum, minimum, their cells and the sum over the cells are
//     |     | 6 x 16 sums |      updated elementwise. Features are read in place, one number at a time, and multiplied
//     v     |     ...     |      with a packed panel of queries.
//
// The softmax then needs the cells around the maximum only. Their costs, about 70 of thousands, are computed again, now with
// channels in the lanes. The backward pass reads the same few cells.
#include "correlation_soft_argmax/backward.h"
#include "correlation_soft_argmax/cost_volume.h"
#include "correlation_soft_argmax/forward.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {
void forward(const CorrelationSoftArgmax& call) {
    for_dtype(call.dtype, [&](auto element) { Forward<decltype(element)>(call).run(); });
}

void backward(const CorrelationSoftArgmax& call) {
    for_dtype(call.dtype, [&](auto element) { Backward<decltype(element)>(call).run(); });
}

void soft_argmax_2d_forward(const SoftArgmax2d& call) {
    for_dtype(call.dtype, [&](auto element) { CostVolume<decltype(element)>(call).forward(); });
}

void soft_argmax_2d_backward(const SoftArgmax2d& call) {
    for_dtype(call.dtype, [&](auto element) { CostVolume<decltype(element)>(call).backward(); });
}

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
