// Temporal window attention on the CPU: every query attends to the keys of the frames around it in its own sequence.
//
//   out_i = sum_j p_ij v_j,   p_i = softmax over i - left <= j <= i + right of scale * q_i . k_j,   0 <= j < T
//
// Queries go in blocks of four. Their windows overlap nearly entirely (16 keys for a window of 13: one AVX-512 vector), so
// that a block is two small products with a softmax in between, each from registers:
//
//             keys ->
//   queries   x x x x x . . .      scores: lanes are keys, so that keys are needed as columns (a transposed copy);
//             . x x x x x . .      output: lanes are channels, values are read as they lie, and a value at the edge of
//             . . x x x x x .      the band meets only the queries that see it.
//             . . . x x x x x
//
// Tasks (a stretch of time of some sequences) share nothing, and what they compute does not depend on who runs them.
#include "temporal_window_attention/backward.h"
#include "temporal_window_attention/forward.h"

namespace tritonkern::TRITONKERN_ISA {
namespace {

template <class Run>
void for_dtype(DType dtype, const Run& run) {
    switch (dtype) {
        case DType::kFloat64:
            return run(double{});
        case DType::kFloat32:
            return run(float{});
        case DType::kBFloat16:
            return run(BFloat16{});
        case DType::kFloat16:
            return run(Float16{});
    }
}

}  // namespace

void temporal_window_attention_forward(const TemporalWindowAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Forward<decltype(element)>(call).run(); });
}

void temporal_window_attention_backward(const TemporalWindowAttention& call) {
    for_dtype(call.dtype, [&](auto element) { Backward<decltype(element)>(call).run(); });
}

}  // namespace tritonkern::TRITONKERN_ISA
