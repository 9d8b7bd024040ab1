// The Python module `tritonkern._cpp`: picks the instruction set once, and hands raw pointers and strides to its
// kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common/memory.h"
#include "temporal_window_attention/call.h"

namespace py = pybind11;

namespace tritonkern {
namespace {

struct Kernels {
    const char* isa;
    bool (*runs_here)();
    void (*forward)(const TemporalWindowAttention&);
    void (*backward)(const TemporalWindowAttention&);
};

#define TRITONKERN_KERNELS(isa, condition)                                            \
    Kernels {                                                                         \
        #isa, [] { return bool(condition); }, isa::temporal_window_attention_forward, \
            isa::temporal_window_attention_backward                                   \
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

// A result: contiguous, and not written yet.
TensorView result_view(uintptr_t data, const Shape& shape, int dtype) {
    TensorView result;
    result.data = reinterpret_cast<void*>(data);
    int64_t stride = 1;
    for (int i = 4; i >= 0; --i) {
        result.stride[i] = stride;
        stride *= shape[i];
    }
    const int64_t element = static_cast<DType>(dtype) == DType::kFloat64   ? 8
                            : static_cast<DType>(dtype) == DType::kFloat32 ? 4
                                                                           : 2;
    expect_writes(result.data, stride * element);
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
        "temporal_window_attention_forward",
        [](int dtype, const Shape& shape, int64_t left, int64_t right, double scale, int num_threads,
           const PyTensor& query, const PyTensor& key, const PyTensor& value, uintptr_t out, uintptr_t lse) {
            auto call = describe(dtype, shape, left, right, scale, num_threads, query, key, value);
            call.lse = reinterpret_cast<void*>(lse);
            call.out = result_view(out, shape, dtype);
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
            call.grad_query = result_view(grad_query, shape, dtype);
            call.grad_key = result_view(grad_key, shape, dtype);
            call.grad_value = result_view(grad_value, shape, dtype);
            kernels().backward(call);
        },
        py::call_guard<py::gil_scoped_release>());
}
