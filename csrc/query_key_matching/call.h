// The calls of query-key matching and of the two operations beside it, as their bindings pass them to the kernels.
#pragma once

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

// query and key [B, T, S, H, D] with adjacent channels. Everything else is contiguous; "real" is the accumulator's type. M source
// cells: those of `cells`, or all S.
struct QueryKeyMatching {
    DType dtype;
    int64_t B, T, S, H, D, M;
    int64_t source, height, width;
    double scale, limit;  // limit: exclusive bound of squared distances to the best cell, 0 for that cell alone
    bool symmetric;
    int num_threads;
    TensorView query, key;
    const int64_t* cells;  // [B, M], or null for all cells
    // Matching: [B, T, M], points [B, T, M, 2]
    int64_t* index;
    void *peak, *points, *weight;  // real
    // Cost, or its gradient: [B, T, M, S], real
    void* cost;
    // Gradients of the results, real, each may be null; gradients of the inputs, [B, T, S, H, D] of `dtype`
    const void *grad_peak, *grad_points, *grad_cost;
    void *grad_query, *grad_key;
};

// rows [B, N, H, D], key [B, J, H, D] with adjacent channels, mask [B, J]; maximum and sum [B, N, G], real.
struct RowStatistics {
    DType dtype;
    int64_t B, N, J, H, D, G;
    double scale;
    int num_threads;
    TensorView rows, key;
    const bool* mask;         // or null
    const int64_t* segments;  // [G, 2]: start and stop
    void *maximum, *sum;
};

// query, key, value [B, n, H, D] with adjacent channels, n = text + frames * S; out [B, n, H, D], contiguous.
struct FrameLocalAttention {
    DType dtype;
    int64_t B, n, H, D, text, frames;
    bool text_last, renormalise;
    double scale;
    int num_threads;
    TensorView query, key, value;
    void* out;
};

TRITONKERN_DECLARE_KERNEL(query_key_matching, forward, QueryKeyMatching)
TRITONKERN_DECLARE_KERNEL(query_key_matching, backward, QueryKeyMatching)
TRITONKERN_DECLARE_KERNEL(query_key_matching, row_statistics, RowStatistics)
TRITONKERN_DECLARE_KERNEL(query_key_matching, frame_local_attention, FrameLocalAttention)

}  // namespace tritonkern
