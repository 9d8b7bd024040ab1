// Track attention on the CPU: rows (tracks when sampling, cells when splatting) attend to the columns near them, frame by frame.
//
//   out_i = sum_j p_ij v_j,   p_i = softmax of scale * q_i . k_j - inverse_variance * |position_i - position_j|^2
//
//   frame -> bounds        the norms of keys and queries bound how far each row must look (Frame::find_reaches)
//         -> lists         the columns of each row with their biases, from bins of tracks; shared by all heads
//         -> heads         a head's keys and values are packed, then batches of rows go through
//                          products with the listed keys | softmax | sum of the listed values
//
//   . . . . . . .     Cost grows with rows x neighbourhood. Lanes are channels: a listed column is a contiguous row of the
//   . . o o . . .     packed matrix, which fits into the second-level cache, and neighbouring rows follow each other.
//   . o o+o o . .     The backward pass adds to packed gradients of a head, which belong to one task, in the order of the
//   . . o o . . .     rows, so that results do not depend on the number of threads.
#include "track_attention/backward.h"
#include "track_attention/forward.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

void forward(const TrackAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Forward<decltype(element)>(call).run(); });
}

void backward(const TrackAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Backward<decltype(element)>(call).run(); });
}

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
