// Runs the kernels of correlation_soft_argmax of one instruction set on buffers that end exactly where their tensors end, for
// AddressSanitizer and UndefinedBehaviorSanitizer to watch. Shapes cover tails of channels, queries and cells, strips (few
// queries in a large frame) and chunks (many queries). The backward passes also run with best and worst cells outside of the
// grid: `torch.ops` passes whatever a caller gives.
#include <cstdio>
#include <vector>

#include "correlation_soft_argmax/call.h"

using namespace tritonkern;
namespace kernels = TRITONKERN_ISA::correlation_soft_argmax;

namespace {

struct Buffer {
    std::vector<unsigned char> bytes;

    explicit Buffer(int64_t size) : bytes(size, 0x3c) {}  // a small positive number in every type
    void* data() { return bytes.data(); }
};

// Axes in memory from the last to the first, each `gap` times as far apart as needed, but for the innermost one.
template <size_t Axes>
int64_t lay_out(const int64_t (&shape)[Axes], int64_t gap, TensorView& view) {
    int64_t stride = 1, last = 0;
    for (int axis = Axes - 1; axis >= 0; --axis) {
        view.stride[axis] = stride;
        last += (shape[axis] - 1) * stride;
        stride *= shape[axis] * gap;
    }
    return last + 1;
}

}  // namespace

int main() {
    int calls = 0;
    const int64_t shapes[][6] = {{1, 1, 1, 1, 1, 1},   {2, 5, 2, 7, 9, 24},    {1, 40, 1, 5, 13, 37},
                                 {1, 2, 1, 90, 91, 1}, {1, 7, 1, 80, 80, 512}, {1, 600, 1, 3, 3, 8}};
    for (int dtype = 0; dtype < 4; ++dtype) {
        const int64_t element = dtype == 0 ? 8 : dtype == 1 ? 4 : 2, real = dtype == 0 ? 8 : 4;
        for (const auto& s : shapes) {
            for (int64_t limit : {1, 25, 54}) {  // squared radius
                for (int option = 0; option < 4; ++option) {
                    const int64_t gap = option % 2 ? 2 : 1;
                    CorrelationSoftArgmax call{};
                    call.dtype = static_cast<DType>(dtype);
                    call.B = s[0], call.N = s[1], call.T = s[2], call.height = s[3], call.width = s[4], call.C = s[5];
                    call.temperature = 20, call.limit = limit, call.eps = 1e-6, call.cosine = option / 2;
                    call.num_threads = 2;
                    Buffer query(lay_out<3>({s[0], s[1], s[5]}, gap, call.query) * element);
                    Buffer features(lay_out<5>({s[0], s[2], s[3], s[4], s[5]}, gap, call.features) * element);
                    call.query.data = query.data(), call.features.data = features.data();
                    const int64_t pairs = s[0] * s[1] * s[2], cells = s[0] * s[2] * s[3] * s[4];
                    Buffer points(2 * pairs * real), mean(pairs * real), maximum = mean, minimum = mean, weight = mean;
                    Buffer best(pairs * 4), worst = best, query_inverse_norm(call.cosine ? s[0] * s[1] * real : 0);
                    Buffer features_inverse_norm(call.cosine ? cells * real : 0), grad_points = points, grad = mean;
                    Buffer grad_query(s[0] * s[1] * s[5] * element), grad_features(cells * s[5] * element);
                    call.points = points.data(), call.mean = mean.data(), call.weight = weight.data();
                    call.maximum = maximum.data(), call.minimum = minimum.data();
                    call.best = static_cast<int32_t*>(best.data()), call.worst = static_cast<int32_t*>(worst.data());
                    call.query_inverse_norm = query_inverse_norm.data(),
                    call.features_inverse_norm = features_inverse_norm.data();
                    kernels::forward(call);
                    call.grad_points = grad_points.data();
                    call.grad_mean = call.grad_maximum = call.grad_minimum = grad.data();
                    call.grad_query = grad_query.data(), call.grad_features = grad_features.data();
                    kernels::backward(call);

                    SoftArgmax2d soft{};
                    soft.dtype = call.dtype, soft.temperature = 20, soft.limit = limit, soft.num_threads = 2;
                    soft.frames[0] = s[0], soft.frames[1] = s[1], soft.frames[2] = s[2];
                    soft.height = s[3], soft.width = s[4];
                    Buffer cost(lay_out<5>({s[0], s[1], s[2], s[3], s[4]}, gap, soft.cost) * element);
                    Buffer grad_cost(pairs * s[3] * s[4] * element);
                    soft.cost.data = cost.data(), soft.grad_cost = grad_cost.data();
                    soft.points = points.data(), soft.maximum = maximum.data(), soft.weight = weight.data();
                    soft.best = call.best, soft.grad_points = grad_points.data();
                    kernels::soft_argmax_2d_forward(soft);
                    kernels::soft_argmax_2d_backward(soft);
                    calls += 4;
                    for (int64_t cell : {-1L, s[3] * s[4], -(1L << 31), (1L << 31) - 1}) {
                        for (int64_t i = 0; i < pairs; ++i) call.best[i] = call.worst[i] = int32_t(cell);
                        kernels::backward(call);
                        kernels::soft_argmax_2d_backward(soft);
                        calls += 2;
                    }
                }
            }
        }
    }
    std::printf("%d calls\n", calls);
}
