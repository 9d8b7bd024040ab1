// Correlation with soft-argmax on the CPU: where a query is found in a frame, without a cost volume.
//
//   cost_i = query . feature_i,   point = sum over the disc around the best cell of softmax_i * centre_i
//
// The costs are a matrix product whose result is read once, while it is in the first-level cache:
//
//               queries ->
//   cells   | 6 x 16 sums |      lanes are queries, so that maximum, minimum, their places and the sum over the cells are
//     |     | 6 x 16 sums |      kept elementwise, and features are used where they lie: one number at a time,
//     v     |     ...     |      multiplied with a packed panel of queries.
//
// The softmax then needs the cells around the maximum only. Their costs, about 70 of thousands, are computed again, now with
// channels in the lanes; so does the backward pass, which is as sparse.
#include "correlation_soft_argmax/backward.h"
#include "correlation_soft_argmax/cost_volume.h"
#include "correlation_soft_argmax/forward.h"

namespace tritonkern::TRITONKERN_ISA {
void correlation_soft_argmax_forward(const CorrelationSoftArgmax& call) {
    for_dtype(call.dtype, [&](auto element) { CorrelationForward<decltype(element)>(call).run(); });
}

void correlation_soft_argmax_backward(const CorrelationSoftArgmax& call) {
    for_dtype(call.dtype, [&](auto element) { CorrelationBackward<decltype(element)>(call).run(); });
}

void soft_argmax_forward(const SoftArgmax& call) {
    for_dtype(call.dtype, [&](auto element) { CostVolume<decltype(element)>(call).forward(); });
}

void soft_argmax_backward(const SoftArgmax& call) {
    for_dtype(call.dtype, [&](auto element) { CostVolume<decltype(element)>(call).backward(); });
}

}  // namespace tritonkern::TRITONKERN_ISA
