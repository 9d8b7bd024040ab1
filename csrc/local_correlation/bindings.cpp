// The Python face of local correlation.
#include "common/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "local_correlation/call.h"

namespace tritonkern {

// (data pointer, strides) of a tensor; fewer than five strides are followed by zeros. A pointer of 0: not wanted.
using PyView = std::pair<uintptr_t, std::array<int64_t, 5>>;
// dtype, dtype of rows, zeros, supports_differ, x_is_fast, number of threads
using PyLocalOptions = std::tuple<int, int, bool, bool, bool, int>;

inline LocalCorrelation local_correlation(const std::array<int64_t, 8>& shape, const PyLocalOptions& options,
                                          const std::array<PyView, 4>& tensors) {
    LocalCorrelation call{};
    const auto view = [](const PyView& x) {
        TensorView result;
        result.data = reinterpret_cast<void*>(x.first);
        for (int i = 0; i < 5; ++i) result.stride[i] = x.second[i];
        return result;
    };
    call.B = shape[0], call.T = shape[1], call.N = shape[2], call.height = shape[3], call.width = shape[4];
    call.C = shape[5], call.S = shape[6], call.radius = shape[7];
    int dtype, rows_dtype;
    std::tie(dtype, rows_dtype, call.zeros, call.supports_differ, call.x_is_fast, call.num_threads) = options;
    call.dtype = static_cast<DType>(dtype), call.rows_dtype = static_cast<DType>(rows_dtype);
    call.features = view(tensors[0]), call.support = view(tensors[1]), call.position = view(tensors[2]);
    call.rows = view(tensors[3]);
    return call;
}

TRITONKERN_BINDINGS(m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def(
        "local_correlation_forward",
        [=](const std::array<int64_t, 8>& shape, const PyLocalOptions& options, const std::array<PyView, 4>& tensors) {
            TRITONKERN_OLD_KERNEL(local_correlation_forward)(local_correlation(shape, options, tensors));
        },
        unlocked);
    m.def(
        "local_correlation_backward",
        [=](const std::array<int64_t, 8>& shape, const PyLocalOptions& options, const std::array<PyView, 4>& tensors,
            const std::array<PyView, 3>& grads) {
            auto call = local_correlation(shape, options, {tensors[0], tensors[1], tensors[2], tensors[3]});
            const auto gradients = local_correlation(shape, options, {grads[0], grads[1], grads[2], PyView{}});
            call.grad_features = gradients.features, call.grad_support = gradients.support;
            call.grad_position = gradients.position;
            TRITONKERN_OLD_KERNEL(local_correlation_backward)(call);
        },
        unlocked);
}

}  // namespace tritonkern
