// The Python module `tritonkern._cpp`: picks the instruction set once, and hands raw pointers and strides to its
// kernels.
#include "temporal_adapter/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "correlation_soft_argmax/call.h"
#include "full_attention/bindings.h"
#include "local_correlation/bindings.h"
#include "temporal_mixer/bindings.h"
#include "temporal_window_attention/call.h"
#include "track_attention/bindings.h"

namespace py = pybind11;

namespace tritonkern {
namespace {

struct Kernels {
    const char* isa;
    bool (*runs_here)();
    void (*forward)(const TemporalWindowAttention&);
    void (*backward)(const TemporalWindowAttention&);
    void (*correlation_forward)(const CorrelationSoftArgmax&);
    void (*correlation_backward)(const CorrelationSoftArgmax&);
    void (*soft_argmax_forward)(const SoftArgmax&);
    void (*soft_argmax_backward)(const SoftArgmax&);
    void (*full_attention_forward)(const FullAttention&);
    void (*group_norm_statistics)(const GroupNormStatistics&);
    void (*group_norm_sums)(const GroupNormBackward&);
    void (*group_norm_gradient)(const GroupNormBackward&);
    void (*conv3x3)(const Conv3x3&);
    void (*conv3x3_weight_gradient)(const Conv3x3WeightGradient&);
    void (*temporal_mixer_forward)(const TemporalMixer&);
    void (*temporal_mixer_backward)(const TemporalMixer&);
    void (*track_attention_forward)(const TrackAttention&);
    void (*track_attention_backward)(const TrackAttention&);
    void (*local_correlation_forward)(const LocalCorrelation&);
    void (*local_correlation_backward)(const LocalCorrelation&);
};

#define TRITONKERN_KERNELS(isa, condition)                                                              \
    Kernels {                                                                                           \
        #isa, [] { return bool(condition); }, isa::temporal_window_attention_forward,                   \
            isa::temporal_window_attention_backward, isa::correlation_soft_argmax_forward,              \
            isa::correlation_soft_argmax_backward, isa::soft_argmax_forward, isa::soft_argmax_backward, \
            isa::full_attention_forward,       \
            isa::group_norm_statistics, isa::group_norm_sums, isa::group_norm_gradient, isa::conv3x3,   \
            isa::conv3x3_weight_gradient, isa::temporal_mixer_forward,     \
            isa::temporal_mixer_backward, isa::track_attention_forward, isa::track_attention_backward,  \
            isa::local_correlation_forward, isa::local_correlation_backward                             \
    }

// Best first.
const Kernels kKernels[] = {
#ifdef __x86_64__
    TRITONKERN_KERNELS(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("f16c")),
    TRITONKERN_KERNELS(
        avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")),
#endif
    TRITONKERN_KERNELS(baseline, true),
};

// The best set that this machine has, or the one that the environment variable TRITONKERN_CPU_ISA names.
const Kernels& kernels() {
    static const Kernels& chosen = []() -> const Kernels& {
        const char* wanted = std::getenv("TRITONKERN_CPU_ISA");
        std::string usable;
        for (const Kernels& candidate : kKernels) {
            if (!candidate.runs_here()) continue;
            if (!wanted || !*wanted || candidate.isa == std::string(wanted)) return candidate;
            usable += usable.empty() ? candidate.isa : std::string(", ") + candidate.isa;
        }
        throw std::runtime_error("TRITONKERN_CPU_ISA is '" + std::string(wanted) +
                                 "', but this machine can use: " + usable + ". Unset it to take the best.");
    }();
    return chosen;
}

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

TemporalWindowAttention describe(int dtype, const Shape& shape, int64_t left, int64_t right, double scale,
                                 int num_threads, const PyTensor& query, const PyTensor& key, const PyTensor& value) {
    TemporalWindowAttention call{};
    call.dtype = static_cast<DType>(dtype);
    call.B = shape[0], call.T = shape[1], call.N = shape[2], call.H = shape[3], call.D = shape[4];
    call.left = left, call.right = right, call.scale = scale, call.num_threads = num_threads;
    call.query = view(query), call.key = view(key), call.value = view(value);
    return call;
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
}  // namespace tritonkern

PYBIND11_MODULE(_cpp, m) {
    using namespace tritonkern;
    m.doc() =
        "CPU kernels of tritonkern. Pointers are integers, strides count elements; the callers in tritonkern.ops check "
        "them.";
    m.def("isa", [] { return kernels().isa; }, "The instruction set that the kernels use: avx512, avx2 or baseline.");
    m.def(
        "isas",
        [] {
            py::list names;
            for (const Kernels& candidate : kKernels)
                if (candidate.runs_here()) names.append(candidate.isa);
            return names;
        },
        "The instruction sets that this machine can use, best first.");
    m.def(
        "is_amd",
        [] {
#ifdef __x86_64__
            return bool(__builtin_cpu_is("amd"));
#else
            return false;
#endif
        },
        "Whether AMD made this processor.");
    m.def(
        "temporal_window_attention_forward",
        [](int dtype, const Shape& shape, int64_t left, int64_t right, double scale, int num_threads,
           const PyTensor& query, const PyTensor& key, const PyTensor& value, uintptr_t out, uintptr_t lse) {
            auto call = describe(dtype, shape, left, right, scale, num_threads, query, key, value);
            call.lse = reinterpret_cast<void*>(lse);
            call.out = result_view(out, shape);
            kernels().forward(call);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "temporal_window_attention_backward",
        [](int dtype, const Shape& shape, int64_t left, int64_t right, double scale, int num_threads,
           const PyTensor& query, const PyTensor& key, const PyTensor& value, const PyTensor& grad_out,
           uintptr_t grad_query, uintptr_t grad_key, uintptr_t grad_value) {
            auto call = describe(dtype, shape, left, right, scale, num_threads, query, key, value);
            call.grad_out = view(grad_out);
            call.grad_query = result_view(grad_query, shape);
            call.grad_key = result_view(grad_key, shape);
            call.grad_value = result_view(grad_value, shape);
            kernels().backward(call);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "correlation_soft_argmax_forward",
        [](int dtype, const std::array<int64_t, 6>& shape, double temperature, double radius, bool cosine, double eps,
           int num_threads, const PyTensor& query, const PyTensor& features, const CorrelationResults& results) {
            kernels().correlation_forward(
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
            kernels().correlation_backward(call);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "soft_argmax_forward",
        [](int dtype, const Shape& shape, double temperature, double radius, int num_threads, const PyTensor& cost,
           const std::array<uintptr_t, 4>& results) {
            kernels().soft_argmax_forward(describe(dtype, shape, temperature, radius, num_threads, cost, results));
        },
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "soft_argmax_backward",
        [](int dtype, const Shape& shape, double temperature, double radius, int num_threads, const PyTensor& cost,
           const std::array<uintptr_t, 4>& results, uintptr_t grad_points, uintptr_t grad_cost) {
            auto call = describe(dtype, shape, temperature, radius, num_threads, cost, results);
            call.grad_points = pointer(grad_points);
            call.grad_cost = result_view(grad_cost, shape).data;
            kernels().soft_argmax_backward(call);
        },
        py::call_guard<py::gil_scoped_release>());
    bind_temporal_adapter(m, [] { return &kernels(); });
    bind_full_attention(m, kernels);
    bind_temporal_mixer(m, kernels);
    bind_track_attention(m, kernels);
    bind_local_correlation(m, kernels);
}
