// The calls of the temporal adapter, as its bindings pass them to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

// Frames [B, T] of channels-last images. The offset of pixel (y, x) within a frame is
//   y / patch * row[0] + y % patch * row[1] + x / patch * column[0] + x % patch * column[1],
// so that an image may be stored patch after patch: then the patches are the rows of a matrix, and a convolution whose
// kernel equals its stride is a matrix product. Strides count elements; the channels of a pixel are adjacent.
struct ImageView {
    void* data = nullptr;
    DType dtype = DType::kFloat32;
    int64_t patch = 1, batch = 0, frame = 0, row[2] = {0, 0}, column[2] = {0, 0};

    explicit operator bool() const { return data != nullptr; }
};

struct AdapterShape {
    int64_t B, T, h, w;
    int num_threads;
};

// GroupNorm statistics over all frames, pixels and channels of a batch entry.
struct GroupNormStatistics {
    AdapterShape shape;
    int64_t C;
    double eps;
    ImageView image;
    double *mean, *rstd;  // [B]
};

// grad_image[c] = slope[b, c] grad[c] + scale[b] image[c] + shift[b]; before that, the sums that those need.
struct GroupNormBackward {
    AdapterShape shape;
    int64_t C;
    ImageView image, grad;
    const double* mean;      // [B]
    double *sums, *moments;  // [B, C]: sums of grad and of grad * (image - mean)
    const void* slope;       // [B, C], as scale and shift in the type of the accumulator
    const void *scale, *shift;
    ImageView grad_image;
};

// What is applied to a pixel before the convolution. Padding is zero after it.
enum class Load : int {
    kPlain = 0,
    kAffine = 1,  // x * scale[b, c] + shift[b, c]
    kRelu = 2,
    kMasked = 3,  // x where the mask is positive (or NaN), otherwise 0: the gradient of ReLU
};

struct Source {
    ImageView image;
    Load load;
    ImageView mask;
    const void *scale, *shift;  // [B, C], in the type of the accumulator
};

// out = residual + relu(conv(source) + bias), 3x3 with a border of zeros, by Winograd's algorithm on tiles of
// `tile` x `tile` results: 2, where images have the type of the accumulator, or 4, where that is
// float. Weights, bias and mask have the type of the accumulator: float, or double for double.
struct Conv3x3 {
    AdapterShape shape;
    int64_t C, O;
    int tile;
    Source source;
    const void* weight;
    int64_t weight_stride[4];  // of output channel, input channel, row, column
    const void* bias;          // [O] or null
    bool relu;
    ImageView residual, mask;  // of out; results where the mask is not positive become 0
    ImageView out;
};

// grad_weight [O, C, 3, 3] and grad_bias [O] of the convolution of `source`, in the type of the accumulator.
struct Conv3x3WeightGradient {
    AdapterShape shape;
    int64_t C, O;
    int tile;
    Source source, grad_out;
    void *grad_weight, *grad_bias;
};

TRITONKERN_DECLARE_KERNEL(temporal_adapter, statistics, GroupNormStatistics)
TRITONKERN_DECLARE_KERNEL(temporal_adapter, sums, GroupNormBackward)
TRITONKERN_DECLARE_KERNEL(temporal_adapter, norm_gradient, GroupNormBackward)
TRITONKERN_DECLARE_KERNEL(temporal_adapter, conv3x3, Conv3x3)
TRITONKERN_DECLARE_KERNEL(temporal_adapter, conv3x3_weight_gradient, Conv3x3WeightGradient)

}  // namespace tritonkern
