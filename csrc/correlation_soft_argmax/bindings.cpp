// Bindings of the correlation with soft-argmax.
#include "common/bindings.h"

#include "correlation_soft_argmax/call.h"

namespace tritonkern {
namespace {

// The address of a contiguous tensor of this dtype and shape.
template <class Data = void>
Data* dense(const char* name, const TensorView& x, DType dtype, std::initializer_list<int64_t> shape) {
    expect(name, x, dtype, shape);
    expect_contiguous(name, x);
    return static_cast<Data*>(x.data);
}

CorrelationSoftArgmax describe(const TensorView& query, const TensorView& features, double temperature, int64_t limit,
                               bool cosine, double eps, int num_threads, const TensorView& points,
                               const TensorView& maximum, const TensorView& best, const TensorView& worst,
                               const TensorView& weight, const TensorView& query_inverse_norm,
                               const TensorView& features_inverse_norm) {
    expect_rank("query", query, 3);
    expect_floating("query", query);
    expect_rank("features", features, 5);
    const int64_t B = query.shape[0], N = query.shape[1], C = query.shape[2];
    const int64_t T = features.shape[1], h = features.shape[2], w = features.shape[3];
    expect("features", features, query.dtype, {B, T, h, w, C});
    if (h < 1 || w < 1 || C < 1) throw std::invalid_argument("features must have at least one cell and one channel");
    expect_adjacent_channels("query", query);
    expect_adjacent_channels("features", features);
    CorrelationSoftArgmax call{};
    call.dtype = query.dtype;
    call.B = B, call.N = N, call.T = T, call.height = h, call.width = w, call.C = C;
    call.temperature = temperature, call.limit = limit, call.cosine = cosine, call.eps = eps;
    call.num_threads = num_threads;
    call.query = query, call.features = features;
    const DType real = accumulator(call.dtype);
    call.points = dense("points", points, real, {B, N, T, 2});
    call.maximum = dense("maximum", maximum, real, {B, N, T});
    call.best = dense<int32_t>("best", best, DType::kInt32, {B, N, T});
    call.worst = dense<int32_t>("worst", worst, DType::kInt32, {B, N, T});
    call.weight = dense("weight", weight, real, {B, N, T});
    if (cosine) {
        call.query_inverse_norm = dense("query_inverse_norm", query_inverse_norm, real, {B, N});
        call.features_inverse_norm = dense("features_inverse_norm", features_inverse_norm, real, {B, T, h, w});
    }
    return call;
}

void forward(const TensorView& query, const TensorView& features, double temperature, int64_t limit, bool cosine,
             double eps, int num_threads, const TensorView& points, const TensorView& mean, const TensorView& maximum,
             const TensorView& minimum, const TensorView& best, const TensorView& worst, const TensorView& weight,
             const TensorView& query_inverse_norm, const TensorView& features_inverse_norm) {
    auto call = describe(query, features, temperature, limit, cosine, eps, num_threads, points, maximum, best, worst,
                         weight, query_inverse_norm, features_inverse_norm);
    call.mean = dense("mean", mean, accumulator(call.dtype), {call.B, call.N, call.T});
    call.minimum = dense("minimum", minimum, accumulator(call.dtype), {call.B, call.N, call.T});
    TRITONKERN_KERNEL(correlation_soft_argmax, forward)(call);
}

void backward(const TensorView& grad_points, const TensorView& grad_mean, const TensorView& grad_maximum,
              const TensorView& grad_minimum, const TensorView& query, const TensorView& features,
              const TensorView& points, const TensorView& maximum, const TensorView& best, const TensorView& worst,
              const TensorView& weight, const TensorView& query_inverse_norm, const TensorView& features_inverse_norm,
              double temperature, int64_t limit, bool cosine, double eps, int num_threads, const TensorView& grad_query,
              const TensorView& grad_features) {
    auto call = describe(query, features, temperature, limit, cosine, eps, num_threads, points, maximum, best, worst,
                         weight, query_inverse_norm, features_inverse_norm);
    const DType real = accumulator(call.dtype);
    const int64_t B = call.B, N = call.N, T = call.T;
    if (grad_points.rank >= 0) call.grad_points = dense("grad_points", grad_points, real, {B, N, T, 2});
    if (grad_mean.rank >= 0) call.grad_mean = dense("grad_mean", grad_mean, real, {B, N, T});
    if (grad_maximum.rank >= 0) call.grad_maximum = dense("grad_maximum", grad_maximum, real, {B, N, T});
    if (grad_minimum.rank >= 0) call.grad_minimum = dense("grad_minimum", grad_minimum, real, {B, N, T});
    call.grad_query = dense("grad_query", grad_query, call.dtype, {B, N, call.C});
    call.grad_features = dense("grad_features", grad_features, call.dtype, {B, T, call.height, call.width, call.C});
    TRITONKERN_KERNEL(correlation_soft_argmax, backward)(call);
}

// The frames of a cost volume are three axes here: [I, J, K, height, width].
SoftArgmax2d describe(const TensorView& cost, double temperature, int64_t limit, int num_threads,
                      const TensorView& points, const TensorView& maximum, const TensorView& best,
                      const TensorView& weight) {
    expect_rank("cost", cost, 5);
    expect_floating("cost", cost);
    SoftArgmax2d call{};
    call.dtype = cost.dtype;
    const int64_t I = call.frames[0] = cost.shape[0], J = call.frames[1] = cost.shape[1];
    const int64_t K = call.frames[2] = cost.shape[2];
    call.height = cost.shape[3], call.width = cost.shape[4];
    if (call.height < 1 || call.width < 1) throw std::invalid_argument("cost must have at least one cell");
    call.temperature = temperature, call.limit = limit, call.num_threads = num_threads;
    call.cost = cost;
    const DType real = accumulator(call.dtype);
    call.points = dense("points", points, real, {I, J, K, 2});
    call.maximum = dense("maximum", maximum, real, {I, J, K});
    call.best = dense<int32_t>("best", best, DType::kInt32, {I, J, K});
    call.weight = dense("weight", weight, real, {I, J, K});
    return call;
}

void soft_argmax_2d_forward(const TensorView& cost, double temperature, int64_t limit, int num_threads,
                            const TensorView& points, const TensorView& maximum, const TensorView& best,
                            const TensorView& weight) {
    TRITONKERN_KERNEL(correlation_soft_argmax, soft_argmax_2d_forward)
    (describe(cost, temperature, limit, num_threads, points, maximum, best, weight));
}

void soft_argmax_2d_backward(const TensorView& grad_points, const TensorView& cost, const TensorView& points,
                             const TensorView& maximum, const TensorView& best, const TensorView& weight,
                             double temperature, int64_t limit, int num_threads, const TensorView& grad_cost) {
    auto call = describe(cost, temperature, limit, num_threads, points, maximum, best, weight);
    const auto& [I, J, K] = call.frames;
    call.grad_points = dense("grad_points", grad_points, accumulator(call.dtype), {I, J, K, 2});
    call.grad_cost = dense("grad_cost", grad_cost, call.dtype, {I, J, K, call.height, call.width});
    TRITONKERN_KERNEL(correlation_soft_argmax, soft_argmax_2d_backward)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("correlation_soft_argmax_forward", forward, arg("query"), arg("features"), arg("temperature"), arg("limit"),
          arg("cosine"), arg("eps"), arg("num_threads"), arg("points"), arg("mean"), arg("maximum"), arg("minimum"),
          arg("best"), arg("worst"), arg("weight"), arg("query_inverse_norm"), arg("features_inverse_norm"),
          Unlocked());
    m.def("correlation_soft_argmax_backward", backward, arg("grad_points"), arg("grad_mean"), arg("grad_maximum"),
          arg("grad_minimum"), arg("query"), arg("features"), arg("points"), arg("maximum"), arg("best"), arg("worst"),
          arg("weight"), arg("query_inverse_norm"), arg("features_inverse_norm"), arg("temperature"), arg("limit"),
          arg("cosine"), arg("eps"), arg("num_threads"), arg("grad_query"), arg("grad_features"), Unlocked());
    m.def("soft_argmax_2d_forward", soft_argmax_2d_forward, arg("cost"), arg("temperature"), arg("limit"),
          arg("num_threads"), arg("points"), arg("maximum"), arg("best"), arg("weight"), Unlocked());
    m.def("soft_argmax_2d_backward", soft_argmax_2d_backward, arg("grad_points"), arg("cost"), arg("points"),
          arg("maximum"), arg("best"), arg("weight"), arg("temperature"), arg("limit"), arg("num_threads"),
          arg("grad_cost"), Unlocked());
}

}  // namespace tritonkern
