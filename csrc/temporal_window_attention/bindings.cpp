// Bindings of temporal window attention: tensors [B, T, N, H, D], and [B, S, N, H, D] of keys and values, of one dtype, of any
// strides where they are inputs.
#include "common/bindings.h"

#include "temporal_window_attention/call.h"

namespace tritonkern {
namespace {

TemporalWindowAttention describe(const TensorView& query, const TensorView& key, const TensorView& value, int64_t left,
                                 int64_t right, double scale, int64_t offset, int64_t start, int num_threads) {
    expect_rank("query", query, 5);
    expect_floating("query", query);
    expect_rank("key", key, 5);
    expect("key", key, query.dtype, {query.shape[0], key.shape[1], query.shape[2], query.shape[3], query.shape[4]});
    expect_like("value", value, key);
    if (offset < 0 || offset > key.shape[1] - query.shape[1])
        throw std::invalid_argument("offset must be from 0 to S - T, got " + std::to_string(offset) + " with S = " +
                                    std::to_string(key.shape[1]) + " and T = " + std::to_string(query.shape[1]));
    if (start < 0 || (start && start >= key.shape[1]))
        throw std::invalid_argument("start must be a row of key, got " + std::to_string(start));
    TemporalWindowAttention call{};
    call.S = key.shape[1], call.offset = offset, call.start = start;
    call.dtype = query.dtype;
    call.B = query.shape[0], call.T = query.shape[1], call.N = query.shape[2], call.H = query.shape[3];
    call.D = query.shape[4];
    call.left = left, call.right = right, call.scale = scale, call.num_threads = num_threads;
    call.query = query, call.key = key, call.value = value;
    return call;
}

TensorView result(const char* name, const TensorView& x, const TensorView& like) {
    expect_like(name, x, like);
    expect_contiguous(name, x);
    return x;
}

void forward(const TensorView& query, const TensorView& key, const TensorView& value, int64_t left, int64_t right,
             double scale, int64_t offset, int64_t start, int num_threads, const TensorView& out,
             const TensorView& lse) {
    auto call = describe(query, key, value, left, right, scale, offset, start, num_threads);
    call.out = result("out", out, query);
    expect("lse", lse, accumulator(call.dtype), {call.B, call.T, call.N, call.H});
    expect_contiguous("lse", lse);
    call.lse = lse.data;
    TRITONKERN_KERNEL(temporal_window_attention, forward)(call);
}

void backward(const TensorView& grad_out, const TensorView& query, const TensorView& key, const TensorView& value,
              int64_t left, int64_t right, double scale, int64_t offset, int num_threads, const TensorView& grad_query,
              const TensorView& grad_key, const TensorView& grad_value) {
    auto call = describe(query, key, value, left, right, scale, offset, 0, num_threads);
    expect_like("grad_out", grad_out, query);
    call.grad_out = grad_out;
    call.grad_query = result("grad_query", grad_query, query);
    call.grad_key = result("grad_key", grad_key, key);
    call.grad_value = result("grad_value", grad_value, key);
    TRITONKERN_KERNEL(temporal_window_attention, backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("temporal_window_attention_forward", forward, arg("query"), arg("key"), arg("value"), arg("left"),
          arg("right"), arg("scale"), arg("offset"), arg("start"), arg("num_threads"), arg("out"), arg("lse"),
          Unlocked());
    m.def("temporal_window_attention_backward", backward, arg("grad_out"), arg("query"), arg("key"), arg("value"),
          arg("left"), arg("right"), arg("scale"), arg("offset"), arg("num_threads"), arg("grad_query"),
          arg("grad_key"), arg("grad_value"), Unlocked());
}

}  // namespace tritonkern
