// Runs local correlation of one instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers that end exactly
// where their tensors end. Shapes cover tails of channels and supports, one cell, the widest radius, several tasks of frames and
// bands of rows; points are inside, across the border, infinitely far away and NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include "local_correlation/call.h"

using namespace tritonkern;

namespace {

struct Buffer {
    std::vector<unsigned char> bytes;
    TensorView view;

    // Neighbours on the last axis are `step` apart, those on the others `gap` times as far as needed.
    template <size_t Axes>
    Buffer(const int64_t (&shape)[Axes], int64_t element, int64_t step, int64_t gap) {
        int64_t stride = step, last = 0;
        for (int axis = Axes - 1; axis >= 0; --axis) {
            view.stride[axis] = stride;
            last += std::max<int64_t>(shape[axis] - 1, 0) * stride;
            stride *= shape[axis] * gap;
        }
        bytes.assign((last + 1) * element, 0x3c);  // a small positive number in every type
        view.data = bytes.data();
    }

    template <class A>
    void fill_with_positions(int64_t size) {
        for (size_t i = 0; i < bytes.size() / sizeof(A); ++i) {
            A& position = static_cast<A*>(view.data)[i];
            position = A(i * 37 % 101) / 90 * A(size) - 1;
            if (i % 17 == 5) position = NAN;
            if (i % 11 == 3) position = i % 2 ? INFINITY : -INFINITY;
        }
    }
};

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    // B, T, N, height, width, C, S, radius
    const int64_t shapes[][8] = {{1, 1, 1, 1, 1, 1, 1, 0},
                                 {2, 3, 5, 7, 9, 24, 9, 1},
                                 {1, 17, 1, 6, 5, 11, 49, 3},
                                 {1, 2, 2, 4, 3, 8, 3, 15},
                                 {1, 1, 4, 40, 5, 131, 21, 2}};
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        const int64_t element = elements[dtype], wide = dtype == 0 ? 8 : 4;
        for (const auto& s : shapes) {
            for (int mode = 0; mode < 16; ++mode) {
                // Numbers without a common divisor: all combinations come up.
                const int layout = calls / 2 % 3, absent = calls / 2 % 5;
                const int64_t step = layout == 1 ? 3 : 1, gap = layout == 2 ? 2 : 1;
                LocalCorrelation call{};
                call.dtype = static_cast<DType>(dtype);
                call.B = s[0], call.T = s[1], call.N = s[2], call.height = s[3], call.width = s[4];
                call.C = s[5], call.S = s[6], call.radius = s[7], call.num_threads = 2;
                call.zeros = mode & 1, call.supports_differ = mode & 2, call.x_is_fast = mode & 4;
                call.rows_dtype = mode & 8 && dtype > 1 ? DType::kFloat32 : call.dtype;
                call.scale = calls / 2 % 7 < 3 ? 0.3 : 0;

                const int64_t of_features[] = {s[0], s[1], s[3], s[4], s[5]}, of_position[] = {s[0], s[1], s[2], 2};
                const int64_t of_support[] = {s[0], s[2], call.supports_differ ? s[1] : 1, s[6], s[5]};
                const int64_t samples = 2 * s[7] + 1, of_rows[] = {s[0], s[1], s[2], samples * samples * s[6]};
                Buffer features(of_features, element, step, gap), support(of_support, element, step, gap);
                Buffer position(of_position, wide, step, gap);
                Buffer rows(of_rows, call.rows_dtype == call.dtype ? element : wide, 1, gap);
                Buffer grad_features(of_features, wide, 1, gap), grad_support(of_support, wide, 1, gap);
                Buffer grad_position(of_position, wide, step, gap);
                // One support for all frames has the stride 0 over them.
                if (!call.supports_differ) support.view.stride[2] = grad_support.view.stride[2] = 0;
                if (dtype == 0) {
                    position.fill_with_positions<double>(s[4]);
                } else {
                    position.fill_with_positions<float>(s[4]);
                }
                call.features = features.view, call.support = support.view, call.position = position.view;
                call.rows = rows.view;
                TRITONKERN_ISA::local_correlation::forward(call);
                if (absent != 0) call.grad_features = grad_features.view;
                if (absent != 1) call.grad_support = grad_support.view;
                if (absent != 2) call.grad_position = grad_position.view;
                TRITONKERN_ISA::local_correlation::backward(call);
                calls += 2;
            }
        }
    }
    // rows, P, S: tails of supports, several tasks.
    const int64_t softmaxes[][3] = {{1, 1, 1}, {40, 9, 49}, {3, 49, 21}, {2, 9, 16}};
    for (const auto& [rows, P, S] : softmaxes) {
        for (int dtype = 0; dtype < 2; ++dtype) {
            LocalCorrelationSoftmax call{};
            call.dtype = static_cast<DType>(dtype), call.rows = rows, call.P = P, call.S = S;
            call.scale = 0.3, call.num_threads = 2;
            const int64_t shape[] = {rows, P * S};
            Buffer weights(shape, elements[dtype], 1, 1), grad(shape, elements[dtype], 1, 1);
            call.weights = weights.view, call.grad = grad.view;
            TRITONKERN_ISA::local_correlation::softmax_backward(call);
            ++calls;
        }
    }
    // M, K, N: tails of rows, columns and depth, several tiles, no products.
    const int64_t products[][3] = {{1, 1, 1}, {7, 200, 33}, {200, 5, 100}, {13, 0, 4}, {30, 400, 97}};
    for (int dtype = 0; dtype < 2; ++dtype) {
        const int64_t element = elements[dtype];
        for (const auto& [M, K, N] : products) {
            for (int mode = 0; mode < 16; ++mode) {
                LocalCorrelationProduct call{};
                call.dtype = static_cast<DType>(dtype), call.M = M, call.K = K, call.N = N;
                call.add = mode & 1, call.num_threads = 2;
                const int64_t of_left[] = {mode & 2 ? K : M, mode & 2 ? M : K};
                const int64_t of_right[] = {mode & 4 ? N : K, mode & 4 ? K : N}, of_out[] = {M, N};
                const int64_t step = mode & 8 ? 2 : 1;
                Buffer left(of_left, element, 1, 1), right(of_right, element, step, 1), out(of_out, element, 1, 1);
                if (mode & 2) std::swap(left.view.stride[0], left.view.stride[1]);
                if (mode & 4) std::swap(right.view.stride[0], right.view.stride[1]);
                call.left = left.view, call.right = right.view, call.out = out.view;
                TRITONKERN_ISA::local_correlation::multiply(call);
                ++calls;
            }
        }
    }
    std::printf("%d calls\n", calls);
}
