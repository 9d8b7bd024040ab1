// The Python face of softmax attention.
#include "common/bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "full_attention/call.h"

namespace tritonkern {

TRITONKERN_BINDINGS(m) {
    using Rows = std::pair<uintptr_t, std::array<int64_t, 3>>;  // address, strides of batch, row and head
    // (B, L, S, H, D)
    m.def(
        "full_attention_forward",
        [=](int dtype, const std::array<int64_t, 5>& shape, double scale, int num_threads, const Rows& query,
            const Rows& key, const Rows& value, uintptr_t out, uintptr_t lse) {
            FullAttention call{};
            call.dtype = static_cast<DType>(dtype);
            call.B = shape[0], call.L = shape[1], call.S = shape[2], call.H = shape[3], call.D = shape[4];
            call.scale = scale, call.num_threads = num_threads;
            call.query = reinterpret_cast<const void*>(query.first);
            call.key = reinterpret_cast<const void*>(key.first);
            call.value = reinterpret_cast<const void*>(value.first);
            for (int i = 0; i < 3; ++i) {
                call.query_stride[i] = query.second[i];
                call.key_stride[i] = key.second[i];
                call.value_stride[i] = value.second[i];
            }
            call.out = reinterpret_cast<void*>(out), call.lse = reinterpret_cast<void*>(lse);
            TRITONKERN_OLD_KERNEL(full_attention_forward)(call);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace tritonkern
