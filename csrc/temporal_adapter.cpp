// The parts of Chrono's temporal adapter that process every token, on the CPU: GroupNorm's statistics, and 3 x 3 convolutions
// that normalise their input and add to their output.
//
//   tokens --statistics--> mean, rstd
//   tokens --(normalise) conv1 (bias, ReLU)--> hidden, stored patch after patch: the pooling convolution is a product
//   hidden --(ReLU) conv2 (bias) + tokens--> new tokens
//
// Tokens [B * T, prefix + h * w, C] are read in place: after the rows of class and register tokens they are a channels-last
// image. Nothing of the tokens' size is written but the result.
#include "temporal_adapter/convolution.h"
#include "temporal_adapter/group_norm.h"
#include "temporal_adapter/weight_gradient.h"

namespace tritonkern::TRITONKERN_ISA::temporal_adapter {
namespace {

// Calls run(A{}) for the type that images of `dtype` are computed in.
template <class Run>
void for_accumulator(DType dtype, const Run& run) {
    if (dtype == DType::kFloat64) {
        run(double{});
    } else {
        run(float{});
    }
}

}  // namespace

void statistics(const GroupNormStatistics& call) {
    for_accumulator(call.image.dtype, [&](auto a) { compute_statistics<decltype(a)>(call); });
}

void sums(const GroupNormBackward& call) {
    for_accumulator(call.image.dtype, [&](auto a) { compute_sums<decltype(a)>(call); });
}

void norm_gradient(const GroupNormBackward& call) {
    for_accumulator(call.image.dtype, [&](auto a) { compute_gradient<decltype(a)>(call); });
}

void conv3x3(const Conv3x3& call) {
    if (call.tile == 4) return convolve<float, 4>(call);
    for_accumulator(call.source.image.dtype, [&](auto a) { convolve<decltype(a), 2>(call); });
}

void conv3x3_weight_gradient(const Conv3x3WeightGradient& call) {
    if (call.tile == 4) return weight_gradient<float, 4>(call);
    for_accumulator(call.source.image.dtype, [&](auto a) { weight_gradient<decltype(a), 2>(call); });
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_adapter
