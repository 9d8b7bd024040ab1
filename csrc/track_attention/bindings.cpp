// The Python face of attention between tracks and a grid.
#include "common/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "track_attention/call.h"

namespace tritonkern {

// (data pointer, strides) of a [B, T, height, width, H, D] tensor; tracks have a height of 1.
using PyVideo = std::pair<uintptr_t, std::array<int64_t, 6>>;
// [B, T, M, height, width, H, D]
using PyTrackShape = std::array<int64_t, 7>;
// scale, precision, splat, culling, number of threads
using PyTrackOptions = std::tuple<double, double, bool, bool, int>;

inline VideoView video_view(const PyVideo& video) {
    VideoView view;
    view.data = reinterpret_cast<void*>(video.first);
    for (int i = 0; i < 6; ++i) view.stride[i] = video.second[i];
    return view;
}

// A result: contiguous.
inline VideoView video_result(uintptr_t data, const TrackAttention& call, bool grid) {
    const int64_t shape[6] = {call.B, call.T, grid ? call.height : 1, grid ? call.width : call.M, call.H, call.D};
    VideoView view;
    view.data = reinterpret_cast<void*>(data);
    int64_t stride = 1;
    for (int i = 5; i >= 0; --i) {
        view.stride[i] = stride;
        stride *= shape[i];
    }
    return view;
}

inline TrackAttention track_attention(int dtype, const PyTrackShape& shape, const PyTrackOptions& options,
                                      const PyVideo& query, const PyVideo& key, const PyVideo& value, uintptr_t tracks,
                                      uintptr_t visible) {
    TrackAttention call{};
    call.dtype = static_cast<DType>(dtype);
    call.B = shape[0], call.T = shape[1], call.M = shape[2], call.height = shape[3], call.width = shape[4];
    call.H = shape[5], call.D = shape[6];
    std::tie(call.scale, call.precision, call.splat, call.culling, call.num_threads) = options;
    call.query = video_view(query), call.key = video_view(key), call.value = video_view(value);
    call.tracks = reinterpret_cast<const void*>(tracks), call.visible = reinterpret_cast<const bool*>(visible);
    return call;
}

TRITONKERN_BINDINGS(m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def(
        "track_attention_forward",
        [=](int dtype, const PyTrackShape& shape, const PyTrackOptions& options, const PyVideo& query,
            const PyVideo& key, const PyVideo& value, uintptr_t tracks, uintptr_t visible, uintptr_t out,
            uintptr_t lse) {
            auto call = track_attention(dtype, shape, options, query, key, value, tracks, visible);
            call.out = video_result(out, call, call.splat);
            call.lse = reinterpret_cast<void*>(lse);
            TRITONKERN_OLD_KERNEL(track_attention_forward)(call);
        },
        unlocked);
    m.def(
        "track_attention_backward",
        [=](int dtype, const PyTrackShape& shape, const PyTrackOptions& options, const PyVideo& query,
            const PyVideo& key, const PyVideo& value, uintptr_t tracks, uintptr_t visible, const PyVideo& grad_out,
            const std::array<uintptr_t, 3>& grads, uintptr_t grad_tracks, uintptr_t grad_precision) {
            auto call = track_attention(dtype, shape, options, query, key, value, tracks, visible);
            call.grad_out = video_view(grad_out);
            call.grad_query = video_result(grads[0], call, call.splat);
            call.grad_key = video_result(grads[1], call, !call.splat);
            call.grad_value = video_result(grads[2], call, !call.splat);
            call.grad_tracks = reinterpret_cast<void*>(grad_tracks);
            call.grad_precision = reinterpret_cast<void*>(grad_precision);
            TRITONKERN_OLD_KERNEL(track_attention_backward)(call);
        },
        unlocked);
}

}  // namespace tritonkern
