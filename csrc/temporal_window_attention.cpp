// Temporal window attention on the CPU: every query attends to the keys of the frames around it in its own sequence.
//
//   out_i = sum_j p_ij v_j,   p_i = softmax over i + offset - left <= j <= i + offset + right of scale * q_i . k_j,   0 <= j < S
//
// The weights are stored by diagonals, one row per offset in the window, so that all lanes of a vector do the same:
//
//             keys ->
//   queries   0 1 2 . . .          scores: lanes are queries. Offset o of eight queries takes eight adjacent keys, one
//             . 0 1 2 . .          unaligned load from a transposed copy; the softmax runs in each lane by itself.
//             . . 0 1 2 .          products with weights: lanes are channels, rows are read where they are stored, and four
//             . . . 0 1 2          rows of the result share the loads. A gradient of keys reads the same weights along columns.
//
// Tasks (a stretch of time of some sequences) share nothing, and their results do not depend on the thread that runs them.
#include "temporal_window_attention/backward.h"
#include "temporal_window_attention/forward.h"

namespace tritonkern::TRITONKERN_ISA::temporal_window_attention {
void forward(const TemporalWindowAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Forward<decltype(element)>(call).run(); });
}

void backward(const TemporalWindowAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Backward<decltype(element)>(call).run(); });
}

}  // namespace tritonkern::TRITONKERN_ISA::temporal_window_attention
