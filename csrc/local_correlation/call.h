// The call of local correlation, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

// The kernels know a slow and a fast axis of offsets: rows and columns. Where x is the slow one, the caller hands over the
// transposed map. Strides count elements and may have any value; what a kernel writes has adjacent channels.
struct LocalCorrelation {
    DType dtype;       // of features and support
    DType rows_dtype;  // of out and grad_out: the same, or that of sums
    int64_t B, T, N, height, width, C, S, radius;
    bool zeros;            // nothing outside of the map, else its border repeated
    bool supports_differ;  // from frame to frame
    bool x_is_fast;        // position is (fast, slow), else (slow, fast)
    int num_threads;
    TensorView features;       // [B, T, height, width, C]
    TensorView support;        // [B, N, T, S, C]; the stride of T is 0 unless supports_differ
    TensorView position;       // [B, T, N, 2] in the type of sums, cell centres at whole numbers
    TensorView rows;           // out or grad_out, [B, T, N, P * S]
    TensorView grad_features;  // backward, added to, in the type of sums, as features; null where not wanted
    TensorView grad_support;   // as support
    TensorView grad_position;  // as position
};

#define TRITONKERN_DECLARE(isa)                                    \
    namespace isa {                                                \
    void local_correlation_forward(const LocalCorrelation& call);  \
    void local_correlation_backward(const LocalCorrelation& call); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
