// Bindings of local correlation. Inputs may have any strides.
#include "common/bindings.h"

#include <utility>

#include "local_correlation/call.h"

namespace tritonkern {
namespace {

// The map as the kernels get it: transposed where x is the slow axis of offsets.
TensorView map_of(TensorView x, bool x_is_fast) {
    if (!x_is_fast) std::swap(x.shape[2], x.shape[3]), std::swap(x.stride[2], x.stride[3]);
    return x;
}

// [B, N, S, C] as [B, N, T, S, C] with the same vectors in every frame.
TensorView per_frame(TensorView x, int64_t T) {
    if (x.rank == 5) return x;
    for (int axis = 4; axis > 2; --axis) x.shape[axis] = x.shape[axis - 1], x.stride[axis] = x.stride[axis - 1];
    x.rank = 5, x.shape[2] = T, x.stride[2] = 0;
    return x;
}

// rows: out or grad_out, [B, T, N, P * S].
LocalCorrelation describe(const char* rows_name, const TensorView& rows, const TensorView& features,
                          const TensorView& support, const TensorView& position, int64_t radius, bool zeros,
                          bool y_first, int num_threads) {
    expect_rank("features", features, 5);
    expect_floating("features", features);
    expect_rank("support", support, support.rank == 5 ? 5 : 4);
    if (radius < 0 || radius > kMaxLocalRadius)
        throw std::invalid_argument("radius must be from 0 to 15, got " + std::to_string(radius));
    LocalCorrelation call{};
    call.dtype = features.dtype, call.rows_dtype = rows.dtype;
    call.features = map_of(features, y_first), call.support = per_frame(support, features.shape[1]);
    call.position = position, call.rows = rows;
    call.B = features.shape[0], call.T = features.shape[1], call.N = support.shape[1];
    call.height = call.features.shape[2], call.width = call.features.shape[3], call.C = features.shape[4];
    call.S = call.support.shape[3], call.radius = radius;
    call.zeros = zeros, call.supports_differ = support.rank == 5, call.x_is_fast = y_first;
    call.num_threads = num_threads;
    if (call.height < 1 || call.width < 1 || call.C < 1)
        throw std::invalid_argument("features must have at least one cell and channel");
    expect("support", call.support, call.dtype, {call.B, call.N, call.T, call.S, call.C});
    expect("position", position, accumulator(call.dtype), {call.B, call.T, call.N, 2});
    const int64_t samples = (2 * radius + 1) * (2 * radius + 1);
    expect(rows_name, rows, rows.dtype == call.dtype ? call.dtype : accumulator(call.dtype),
           {call.B, call.T, call.N, samples * call.S});
    expect_adjacent_channels(rows_name, rows);
    return call;
}

// scale: of the softmax, or 0.
void forward(const TensorView& features, const TensorView& support, const TensorView& position, int64_t radius,
             bool zeros, bool y_first, double scale, int num_threads, const TensorView& out) {
    auto call = describe("out", out, features, support, position, radius, zeros, y_first, num_threads);
    if (!(scale >= 0)) throw std::invalid_argument("scale must not be negative, got " + std::to_string(scale));
    call.scale = scale;
    TRITONKERN_KERNEL(local_correlation, forward)(call);
}

// The gradient of x, or null; in the type of sums, with adjacent channels.
TensorView gradient(const char* name, const TensorView& grad, const TensorView& x) {
    if (grad.rank < 0) return grad;
    expect_shape(name, grad, x.rank, x.shape);
    expect_dtype(name, grad, accumulator(x.dtype));
    return grad;
}

void backward(const TensorView& grad_out, const TensorView& features, const TensorView& support,
              const TensorView& position, int64_t radius, bool zeros, bool y_first, int num_threads,
              const TensorView& grad_features, const TensorView& grad_support, const TensorView& grad_position) {
    auto call = describe("grad_out", grad_out, features, support, position, radius, zeros, y_first, num_threads);
    call.grad_features = gradient("grad_features", grad_features, features);
    call.grad_support = gradient("grad_support", grad_support, support);
    call.grad_position = gradient("grad_position", grad_position, position);
    if (call.grad_features.data) {
        expect_adjacent_channels("grad_features", call.grad_features);
        call.grad_features = map_of(call.grad_features, y_first);
    }
    if (call.grad_support.data) {
        expect_adjacent_channels("grad_support", call.grad_support);
        call.grad_support = per_frame(call.grad_support, call.T);
    }
    TRITONKERN_KERNEL(local_correlation, backward)(call);
}

void multiply(const TensorView& left, const TensorView& right, bool add, int num_threads, const TensorView& out) {
    expect_rank("left", left, 2);
    expect_rank("right", right, 2);
    LocalCorrelationProduct call{};
    call.dtype = left.dtype, call.M = left.shape[0], call.K = left.shape[1], call.N = right.shape[1];
    call.add = add, call.num_threads = num_threads;
    call.left = left, call.right = right, call.out = out;
    expect("left", left, accumulator(left.dtype), {call.M, call.K});
    expect("right", right, left.dtype, {call.K, call.N});
    expect("out", out, left.dtype, {call.M, call.N});
    expect_contiguous("out", out);
    if (left.stride[0] != 1 && left.stride[1] != 1)
        throw std::invalid_argument("left must have adjacent numbers along one of its axes");
    TRITONKERN_KERNEL(local_correlation, multiply)(call);
}

// weights and grad: [..., P * S] with P samples.
void softmax_backward(const TensorView& weights, int64_t samples, double scale, int num_threads,
                      const TensorView& grad) {
    if (weights.rank < 1) throw std::invalid_argument("weights must have at least one axis");
    expect_like("grad", grad, weights);
    expect_dtype("weights", weights, accumulator(weights.dtype));
    expect_contiguous("weights", weights);
    expect_contiguous("grad", grad);
    LocalCorrelationSoftmax call{};
    const int64_t length = weights.shape[weights.rank - 1];
    if (samples < 1 || length % samples)
        throw std::invalid_argument("samples must divide the last axis of weights, got " + std::to_string(samples));
    call.dtype = weights.dtype, call.rows = 1, call.P = samples, call.S = length / samples;
    for (int axis = 0; axis + 1 < weights.rank; ++axis) call.rows *= weights.shape[axis];
    call.scale = scale, call.num_threads = num_threads;
    call.weights = weights, call.grad = grad;
    TRITONKERN_KERNEL(local_correlation, softmax_backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("local_correlation_forward", forward, arg("features"), arg("support"), arg("position"), arg("radius"),
          arg("zeros"), arg("y_first"), arg("scale"), arg("num_threads"), arg("out"), Unlocked());
    m.def("local_correlation_backward", backward, arg("grad_out"), arg("features"), arg("support"), arg("position"),
          arg("radius"), arg("zeros"), arg("y_first"), arg("num_threads"), arg("grad_features"), arg("grad_support"),
          arg("grad_position"), Unlocked());
    m.def("local_correlation_multiply", multiply, arg("left"), arg("right"), arg("add"), arg("num_threads"), arg("out"),
          Unlocked());
    m.def("local_correlation_softmax_backward", softmax_backward, arg("weights"), arg("samples"), arg("scale"),
          arg("num_threads"), arg("grad"), Unlocked());
}

}  // namespace tritonkern
