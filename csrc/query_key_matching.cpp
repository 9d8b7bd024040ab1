// Matching by queries and keys on the CPU: softmax over the cells of one frame, mean over heads, arg max; see block.h for the
// products and forward.h for what is stored.
#include "query_key_matching/backward.h"
#include "query_key_matching/forward.h"
#include "query_key_matching/rows.h"

namespace tritonkern::TRITONKERN_ISA::query_key_matching {

void forward(const QueryKeyMatching& call) {
    if (call.dtype == DType::kFloat64) return Forward<double>(call).run();
    Forward<float>(call).run();
}

void backward(const QueryKeyMatching& call) {
    if (call.dtype == DType::kFloat64) return Backward<double>(call).run();
    Backward<float>(call).run();
}

void row_statistics(const RowStatistics& call) {
    if (call.dtype == DType::kFloat64) return Statistics<double>(call).run();
    Statistics<float>(call).run();
}

void frame_local_attention(const FrameLocalAttention& call) {
    if (call.dtype == DType::kFloat64) return FrameLocal<double>(call).run();
    FrameLocal<float>(call).run();
}

}  // namespace tritonkern::TRITONKERN_ISA::query_key_matching
