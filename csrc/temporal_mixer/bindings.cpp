// The Python face of the temporal mixer.
#include "common/bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "temporal_mixer/call.h"

namespace tritonkern {

using PyMixerShape = std::array<int64_t, 4>;
// (data pointer, strides of batch, track and frame)
using PyFrames = std::pair<uintptr_t, std::array<int64_t, 3>>;

inline FrameView frame_view(const PyFrames& frames) {
    const auto& [data, stride] = frames;
    return {reinterpret_cast<void*>(data), {stride[0], stride[1], stride[2]}};
}

inline TemporalMixer temporal_mixer(const PyMixerShape& shape) {
    TemporalMixer call{};
    call.B = shape[0], call.N = shape[1], call.T = shape[2], call.C = shape[3];
    return call;
}

// Addresses of the norm's weight, and of each convolution's weight and bias, as many as there are.
template <size_t Count>
TemporalMixer temporal_mixer(int dtype, const PyMixerShape& shape, bool causal, double eps, int num_threads,
                             const PyFrames& x, const std::array<uintptr_t, Count>& parameters) {
    TemporalMixer call = temporal_mixer(shape);
    call.dtype = static_cast<DType>(dtype), call.causal = causal, call.eps = eps, call.num_threads = num_threads;
    call.x = frame_view(x);
    const void** const fields[] = {&call.norm_weight, &call.conv1_weight, &call.conv1_bias, &call.conv2_weight,
                                   &call.conv2_bias};
    for (size_t i = 0; i < Count; ++i) *fields[i] = reinterpret_cast<const void*>(parameters[i]);
    return call;
}

TRITONKERN_BINDINGS(m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("temporal_mixer_tasks", [](const PyMixerShape& shape) { return temporal_mixer(shape).tasks(); });
    m.def(
        "temporal_mixer_forward",
        [=](int dtype, const PyMixerShape& shape, bool causal, double eps, int num_threads, const PyFrames& x,
            const std::array<uintptr_t, 5>& parameters, const std::array<uintptr_t, 2>& states,
            const std::array<uintptr_t, 3>& results) {
            auto call = temporal_mixer(dtype, shape, causal, eps, num_threads, x, parameters);
            call.normed_state = reinterpret_cast<const void*>(states[0]);
            call.hidden_state = reinterpret_cast<const void*>(states[1]);
            call.out = reinterpret_cast<void*>(results[0]);
            call.new_normed_state = reinterpret_cast<void*>(results[1]);
            call.new_hidden_state = reinterpret_cast<void*>(results[2]);
            TRITONKERN_OLD_KERNEL(temporal_mixer_forward)(call);
        },
        unlocked);
    m.def(
        "temporal_mixer_backward",
        [=](int dtype, const PyMixerShape& shape, bool causal, double eps, int num_threads, const PyFrames& x,
            const PyFrames& grad_out, const std::array<uintptr_t, 4>& parameters,
            const std::array<uintptr_t, 2>& results, int64_t chunk) {
            auto call = temporal_mixer(dtype, shape, causal, eps, num_threads, x, parameters);
            call.grad_out = frame_view(grad_out);
            call.grad_x = reinterpret_cast<void*>(results[0]);
            call.partial = reinterpret_cast<void*>(results[1]), call.chunk = chunk;
            TRITONKERN_OLD_KERNEL(temporal_mixer_backward)(call);
        },
        unlocked);
}

}  // namespace tritonkern
