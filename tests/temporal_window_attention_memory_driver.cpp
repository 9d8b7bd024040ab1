// Runs the CPU kernels of one instruction set on buffers that end exactly where their tensors end, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch. Compiled by test_cpp_build.py; shapes cover tails of time, head dim and
// window, and a window so wide that the backward pass goes by blocks.
#include <cstdio>
#include <cstring>
#include <vector>

#include "temporal_window_attention/call.h"

using namespace tritonkern;

namespace {

// Which order the axes of a tensor have in memory, and whether its channels have gaps.
enum class Layout { kContiguous, kTimeInnermost, kGaps };

struct Buffer {
    std::vector<unsigned char> bytes;
    TensorView view;

    Buffer(const int64_t (&shape)[5], int64_t element, Layout layout) {
        const int order[3][5] = {{4, 3, 2, 1, 0}, {1, 4, 3, 2, 0}, {4, 3, 2, 1, 0}};
        int64_t stride = layout == Layout::kGaps ? 3 : 1, last = 0;
        for (int axis : order[int(layout)]) {
            view.stride[axis] = stride;
            last += (shape[axis] - 1) * stride;
            stride *= shape[axis];
        }
        bytes.assign((last + 1) * element, 0x3c);  // a small positive number in every type
        view.data = bytes.data();
    }
};

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    const int64_t shapes[][5] = {{2, 24, 1, 4, 32}, {1, 1, 1, 1, 8},   {1, 5, 2, 1, 24}, {1, 150, 1, 1, 64},
                                 {1, 33, 3, 2, 40}, {1, 9, 1, 1, 256}, {1, 400, 1, 1, 8}};
    const int64_t windows[][2] = {{6, 6}, {0, 0}, {3, 1}, {1000, 1000}};
    const int64_t continued[][3] = {{0, 0, 0}, {160, 130, 17}};  // more keys than queries, offset, start
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        for (const auto& shape : shapes) {
            for (const auto& window : windows) {
                for (int choice = 0; choice < 4; ++choice) {
                    const Layout layout = Layout(choice % 3);
                    const auto& [more, offset, start] = continued[choice == 3];
                    const int64_t element = elements[dtype];
                    const int64_t keys[5] = {shape[0], shape[1] + more, shape[2], shape[3], shape[4]};
                    Buffer query(shape, element, layout), key(keys, element, layout), value(keys, element, layout);
                    Buffer grad_out(shape, element, layout), out(shape, element, Layout::kContiguous);
                    Buffer grad_query = out, grad_key(keys, element, Layout::kContiguous), grad_value = grad_key;
                    const int64_t rows[5] = {shape[0], shape[1], shape[2], shape[3], 1};
                    Buffer lse(rows, dtype == 0 ? 8 : 4, Layout::kContiguous);

                    TemporalWindowAttention call{};
                    call.dtype = static_cast<DType>(dtype);
                    call.B = shape[0], call.T = shape[1], call.N = shape[2], call.H = shape[3], call.D = shape[4];
                    call.S = keys[1], call.offset = offset, call.start = start;
                    call.left = window[0], call.right = window[1], call.scale = 0.125, call.num_threads = 2;
                    call.query = query.view, call.key = key.view, call.value = value.view,
                    call.grad_out = grad_out.view;
                    call.lse = lse.view.data;
                    // Copies of a Buffer own other memory than the view of the original points to.
                    call.out = out.view;
                    call.grad_query = out.view, call.grad_query.data = grad_query.bytes.data();
                    call.grad_key = grad_key.view;
                    call.grad_value = grad_key.view, call.grad_value.data = grad_value.bytes.data();
                    TRITONKERN_ISA::temporal_window_attention::forward(call);
                    TRITONKERN_ISA::temporal_window_attention::backward(call);
                    calls += 2;
                }
            }
        }
    }
    std::printf("%d calls\n", calls);
}
