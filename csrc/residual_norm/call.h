// The call of the residual sum with its LayerNorm, as the bindings hand it to the kernels of one instruction set.
#pragma once

#include "common/tensor.h"

namespace tritonkern {

// Rows of C adjacent numbers; parameters and their gradients are of the accumulator's type. What is absent is null.
struct ResidualNorm {
    DType dtype, branch_dtype, out_dtype;  // of x, of the branch, of the normalised rows
    int64_t rows, C;
    double eps;
    int num_threads;
    const void *x, *branch, *gamma, *weight, *bias;  // backward: x is the sum
    void *sum, *normed;                              // forward
    const void *grad_sum, *grad_normed;              // backward
    void *grad_x, *grad_branch;
    // Backward: for every `chunk` rows their part of the gradients of gamma, weight and bias, [chunks, 3, C].
    void* partial;
    int64_t chunk;
};

#define TRITONKERN_DECLARE(isa)                         \
    namespace isa {                                     \
    void residual_norm_forward(const ResidualNorm& c);  \
    void residual_norm_backward(const ResidualNorm& c); \
    }
TRITONKERN_DECLARE(baseline)
TRITONKERN_DECLARE(avx2)
TRITONKERN_DECLARE(avx512)
#undef TRITONKERN_DECLARE

}  // namespace tritonkern
