// The Python face of the temporal block.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "temporal_block/call.h"

namespace tritonkern {

// `kernels()` returns pointers to the functions of call.h for this machine.
template <class GetKernels>
void bind_temporal_block(pybind11::module_& m, const GetKernels& kernels) {
    namespace py = pybind11;
    // (B, T, N, C, H), frames before and after, (data pointer, strides of batch, frame and position), parameters as in call.h
    m.def(
        "temporal_block_forward",
        [=](int dtype, const std::array<int64_t, 5>& shape, const std::array<int64_t, 2>& window, double eps,
            int num_threads, const std::pair<uintptr_t, std::array<int64_t, 3>>& x,
            const std::array<uintptr_t, 6>& parameters, uintptr_t out) {
            TemporalBlock call{};
            call.dtype = static_cast<DType>(dtype);
            call.B = shape[0], call.T = shape[1], call.N = shape[2], call.C = shape[3], call.H = shape[4];
            call.left = window[0], call.right = window[1], call.eps = eps, call.num_threads = num_threads;
            call.x = reinterpret_cast<const void*>(x.first);
            for (int i = 0; i < 3; ++i) call.stride[i] = x.second[i];
            const void** const fields[] = {&call.norm_weight, &call.norm_bias,   &call.qkv_weight,
                                           &call.qkv_bias,    &call.proj_weight, &call.proj_bias};
            for (int i = 0; i < 6; ++i) *fields[i] = reinterpret_cast<const void*>(parameters[i]);
            call.out = reinterpret_cast<void*>(out);
            kernels().temporal_block_forward(call);
        },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace tritonkern
