// Bindings of temporal window attention: tensors [B, T, N, H, D] of one dtype, of any strides where they are inputs.
#include "common/bindings.h"

#include "temporal_window_attention/call.h"

namespace tritonkern {
namespace {

TemporalWindowAttention describe(const TensorView& query, const TensorView& key, const TensorView& value, int64_t left,
                                 int64_t right, double scale, int num_threads) {
    expect_rank("query", query, 5);
    expect_floating("query", query);
    expect_like("key", key, query);
    expect_like("value", value, query);
    TemporalWindowAttention call{};
    call.dtype = query.dtype;
    call.B = query.shape[0], call.T = query.shape[1], call.N = query.shape[2], call.H = query.shape[3];
    call.D = query.shape[4];
    call.left = left, call.right = right, call.scale = scale, call.num_threads = num_threads;
    call.query = query, call.key = key, call.value = value;
    return call;
}

TensorView result(const char* name, const TensorView& x, const TensorView& query) {
    expect_like(name, x, query);
    expect_contiguous(name, x);
    return x;
}

void forward(const TensorView& query, const TensorView& key, const TensorView& value, int64_t left, int64_t right,
             double scale, int num_threads, const TensorView& out, const TensorView& lse) {
    auto call = describe(query, key, value, left, right, scale, num_threads);
    call.out = result("out", out, query);
    expect("lse", lse, accumulator(call.dtype), {call.B, call.T, call.N, call.H});
    expect_contiguous("lse", lse);
    call.lse = lse.data;
    TRITONKERN_KERNEL(temporal_window_attention, forward)(call);
}

void backward(const TensorView& grad_out, const TensorView& query, const TensorView& key, const TensorView& value,
              int64_t left, int64_t right, double scale, int num_threads, const TensorView& grad_query,
              const TensorView& grad_key, const TensorView& grad_value) {
    auto call = describe(query, key, value, left, right, scale, num_threads);
    expect_like("grad_out", grad_out, query);
    call.grad_out = grad_out;
    call.grad_query = result("grad_query", grad_query, query);
    call.grad_key = result("grad_key", grad_key, query);
    call.grad_value = result("grad_value", grad_value, query);
    TRITONKERN_KERNEL(temporal_window_attention, backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("temporal_window_attention_forward", forward, arg("query"), arg("key"), arg("value"), arg("left"),
          arg("right"), arg("scale"), arg("num_threads"), arg("out"), arg("lse"), Unlocked());
    m.def("temporal_window_attention_backward", backward, arg("grad_out"), arg("query"), arg("key"), arg("value"),
          arg("left"), arg("right"), arg("scale"), arg("num_threads"), arg("grad_query"), arg("grad_key"),
          arg("grad_value"), Unlocked());
}

}  // namespace tritonkern
