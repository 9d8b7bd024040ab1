// Bindings of the correlation with soft-argmax.
#include "common/bindings.h"

#include <pybind11/stl.h>

#include "correlation_soft_argmax/call.h"

namespace tritonkern {
namespace {

// (data pointer, strides) of a [B, T, N, H, D] tensor.
using PyTensor = std::pair<uintptr_t, std::array<int64_t, 5>>;
using Shape = std::array<int64_t, 5>;

TensorView view(const PyTensor& tensor) {
    TensorView result;
    result.data = reinterpret_cast<void*>(tensor.first);
    for (int i = 0; i < 5; ++i) result.stride[i] = tensor.second[i];
    return result;
}

// A result: contiguous.
TensorView result_view(uintptr_t data, const Shape& shape) {
    TensorView result;
    result.data = reinterpret_cast<void*>(data);
    int64_t stride = 1;
    for (int i = 4; i >= 0; --i) {
        result.stride[i] = stride;
        stride *= shape[i];
    }
    return result;
}

template <class X = void>
X* pointer(uintptr_t address) {
    return reinterpret_cast<X*>(address);
}

// Addresses of points, mean, maximum, minimum, best, worst, weight, query_scale and features_scale.
using CorrelationResults = std::array<uintptr_t, 9>;

CorrelationSoftArgmax describe(int dtype, const std::array<int64_t, 6>& shape, double temperature, double radius,
                               bool cosine, double eps, int num_threads, const PyTensor& query,
                               const PyTensor& features, const CorrelationResults& results) {
    CorrelationSoftArgmax call{};
    call.dtype = static_cast<DType>(dtype);
    call.B = shape[0], call.N = shape[1], call.T = shape[2];
    call.height = shape[3], call.width = shape[4], call.C = shape[5];
    call.temperature = temperature, call.radius = radius, call.cosine = cosine, call.eps = eps;
    call.num_threads = num_threads;
    call.query = view(query), call.features = view(features);
    call.points = pointer(results[0]), call.mean = pointer(results[1]);
    call.maximum = pointer(results[2]), call.minimum = pointer(results[3]);
    call.best = pointer<int32_t>(results[4]), call.worst = pointer<int32_t>(results[5]);
    call.weight = pointer(results[6]);
    call.query_scale = pointer(results[7]), call.features_scale = pointer(results[8]);
    return call;
}

// Addresses of points, maximum, best and weight.
SoftArgmax describe(int dtype, const Shape& shape, double temperature, double radius, int num_threads,
                    const PyTensor& cost, const std::array<uintptr_t, 4>& results) {
    SoftArgmax call{};
    call.dtype = static_cast<DType>(dtype);
    for (int i = 0; i < 3; ++i) call.frames[i] = shape[i];
    call.height = shape[3], call.width = shape[4];
    call.temperature = temperature, call.radius = radius, call.num_threads = num_threads;
    call.cost = view(cost);
    call.points = pointer(results[0]), call.maximum = pointer(results[1]);
    call.best = pointer<int32_t>(results[2]), call.weight = pointer(results[3]);
    return call;
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    m.def(
        "correlation_soft_argmax_forward",
        [](int dtype, const std::array<int64_t, 6>& shape, double temperature, double radius, bool cosine, double eps,
           int num_threads, const PyTensor& query, const PyTensor& features, const CorrelationResults& results) {
            TRITONKERN_OLD_KERNEL(correlation_soft_argmax_forward)(
                describe(dtype, shape, temperature, radius, cosine, eps, num_threads, query, features, results));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "correlation_soft_argmax_backward",
        [](int dtype, const std::array<int64_t, 6>& shape, double temperature, double radius, bool cosine, double eps,
           int num_threads, const PyTensor& query, const PyTensor& features, const CorrelationResults& results,
           const std::array<uintptr_t, 4>& grads, uintptr_t grad_query, uintptr_t grad_features) {
            auto call = describe(dtype, shape, temperature, radius, cosine, eps, num_threads, query, features, results);
            call.grad_points = pointer(grads[0]), call.grad_mean = pointer(grads[1]);
            call.grad_maximum = pointer(grads[2]), call.grad_minimum = pointer(grads[3]);
            call.grad_query = pointer(grad_query), call.grad_features = pointer(grad_features);
            TRITONKERN_OLD_KERNEL(correlation_soft_argmax_backward)(call);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "soft_argmax_forward",
        [](int dtype, const Shape& shape, double temperature, double radius, int num_threads, const PyTensor& cost,
           const std::array<uintptr_t, 4>& results) {
            TRITONKERN_OLD_KERNEL(soft_argmax_forward)(
                describe(dtype, shape, temperature, radius, num_threads, cost, results));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "soft_argmax_backward",
        [](int dtype, const Shape& shape, double temperature, double radius, int num_threads, const PyTensor& cost,
           const std::array<uintptr_t, 4>& results, uintptr_t grad_points, uintptr_t grad_cost) {
            auto call = describe(dtype, shape, temperature, radius, num_threads, cost, results);
            call.grad_points = pointer(grad_points);
            call.grad_cost = result_view(grad_cost, shape).data;
            TRITONKERN_OLD_KERNEL(soft_argmax_backward)(call);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace tritonkern
