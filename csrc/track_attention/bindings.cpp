// Bindings of track attention: tracks are [B, T, M, H, D] and grids [B, T, height, width, H, D], of one dtype and of any
// strides where they are inputs.
#include "common/bindings.h"

#include "track_attention/call.h"

namespace tritonkern {
namespace {

// A tensor of tracks as a grid of height 1.
TensorView as_grid(const TensorView& x) {
    if (x.rank != 5) return x;
    TensorView grid = x;
    grid.rank = 6;
    for (int axis = 5; axis > 2; --axis) grid.shape[axis] = x.shape[axis - 1], grid.stride[axis] = x.stride[axis - 1];
    grid.shape[2] = 1, grid.stride[2] = x.shape[2] * x.stride[2];
    return grid;
}

TrackAttention describe(const TensorView& query, const TensorView& key, const TensorView& value,
                        const TensorView& tracks, const TensorView& visible, double inverse_variance, double scale,
                        bool splat, bool culling, int num_threads) {
    expect_rank("query", query, splat ? 6 : 5);
    expect_floating("query", query);
    expect_rank("key", key, splat ? 5 : 6);
    const TensorView &grid = splat ? query : key, &points = splat ? key : query;
    TrackAttention call{};
    call.dtype = query.dtype;
    call.B = query.shape[0], call.T = query.shape[1], call.M = points.shape[2];
    call.height = grid.shape[2], call.width = grid.shape[3], call.H = grid.shape[4], call.D = grid.shape[5];
    expect(splat ? "query" : "key", grid, call.dtype, {call.B, call.T, call.height, call.width, call.H, call.D});
    expect(splat ? "key" : "query", points, call.dtype, {call.B, call.T, call.M, call.H, call.D});
    expect_like("value", value, key);
    expect("tracks", tracks, accumulator(call.dtype), {call.B, call.T, call.M, 2});
    expect_contiguous("tracks", tracks);
    if (visible.rank >= 0) {
        expect("visible", visible, DType::kBool, {call.B, call.T, call.M});
        expect_contiguous("visible", visible);
    }
    call.scale = scale, call.inverse_variance = inverse_variance;
    call.splat = splat, call.culling = culling, call.num_threads = num_threads;
    call.query = as_grid(query), call.key = as_grid(key), call.value = as_grid(value);
    call.tracks = tracks.data, call.visible = static_cast<const bool*>(visible.data);
    return call;
}

TensorView result(const char* name, const TensorView& x, const TensorView& like) {
    expect_like(name, x, like);
    expect_contiguous(name, x);
    return as_grid(x);
}

void forward(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& tracks,
             const TensorView& visible, double inverse_variance, double scale, bool splat, bool culling,
             int num_threads, const TensorView& out) {
    auto call = describe(query, key, value, tracks, visible, inverse_variance, scale, splat, culling, num_threads);
    call.out = result("out", out, query);
    TRITONKERN_KERNEL(track_attention, forward)(call);
}

void backward(const TensorView& grad_out, const TensorView& query, const TensorView& key, const TensorView& value,
              const TensorView& tracks, const TensorView& visible, double inverse_variance, double scale, bool splat,
              bool culling, int num_threads, const TensorView& grad_query, const TensorView& grad_key,
              const TensorView& grad_value, const TensorView& grad_tracks, const TensorView& grad_inverse_variance) {
    auto call = describe(query, key, value, tracks, visible, inverse_variance, scale, splat, culling, num_threads);
    expect_like("grad_out", grad_out, query);
    call.grad_out = as_grid(grad_out);
    call.grad_query = result("grad_query", grad_query, query);
    call.grad_key = result("grad_key", grad_key, key);
    call.grad_value = result("grad_value", grad_value, value);
    if (grad_tracks.rank >= 0) call.grad_tracks = result("grad_tracks", grad_tracks, tracks).data;
    if (grad_inverse_variance.rank >= 0) {
        expect("grad_inverse_variance", grad_inverse_variance, tracks.dtype, {});
        call.grad_inverse_variance = grad_inverse_variance.data;
    }
    TRITONKERN_KERNEL(track_attention, backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("track_attention_forward", forward, arg("query"), arg("key"), arg("value"), arg("tracks"), arg("visible"),
          arg("inverse_variance"), arg("scale"), arg("splat"), arg("culling"), arg("num_threads"), arg("out"),
          Unlocked());
    m.def("track_attention_backward", backward, arg("grad_out"), arg("query"), arg("key"), arg("value"), arg("tracks"),
          arg("visible"), arg("inverse_variance"), arg("scale"), arg("splat"), arg("culling"), arg("num_threads"),
          arg("grad_query"), arg("grad_key"), arg("grad_value"), arg("grad_tracks"), arg("grad_inverse_variance"),
          Unlocked());
}

}  // namespace tritonkern
