// Bindings of softmax attention.
#include "common/bindings.h"

#include "full_attention/call.h"

namespace tritonkern {
namespace {

void forward(const TensorView& query, const TensorView& key, const TensorView& value, double scale, int num_threads,
             const TensorView& out, const TensorView& lse) {
    expect_rank("query", query, 4);
    expect_floating("query", query);
    expect_rank("key", key, 4);
    FullAttention call{};
    call.dtype = query.dtype;
    call.B = query.shape[0], call.L = query.shape[1], call.S = key.shape[1], call.H = query.shape[2];
    call.D = query.shape[3];
    expect("key", key, call.dtype, {call.B, call.S, call.H, call.D});
    expect_like("value", value, key);
    expect_adjacent_channels("query", query);
    expect_adjacent_channels("key", key);
    expect_adjacent_channels("value", value);
    expect_like("out", out, query);
    expect_contiguous("out", out);
    expect("lse", lse, accumulator(call.dtype), {call.B, call.L, call.H});
    expect_contiguous("lse", lse);
    call.scale = scale, call.num_threads = num_threads;
    call.query = query, call.key = key, call.value = value;
    call.out = out.data, call.lse = lse.data;
    TRITONKERN_KERNEL(full_attention, forward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("full_attention_forward", forward, arg("query"), arg("key"), arg("value"), arg("scale"), arg("num_threads"),
          arg("out"), arg("lse"), Unlocked());
}

}  // namespace tritonkern
