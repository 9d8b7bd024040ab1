// Runs the gated linear recurrence of one instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers that end
// exactly where their tensors end. Shapes cover tails of channels, one frame, and tasks of several blocks of sequences.
#include <cstdio>
#include <list>
#include <vector>

#include "gated_linear_recurrence/call.h"

using namespace tritonkern;

namespace {

enum class Layout { kContiguous, kSequencesFirst, kGaps };

// All tensors of a call, each in memory of its own.
struct Memory {
    std::list<std::vector<unsigned char>> tensors;

    void* take(int64_t bytes) {
        return tensors.emplace_back(bytes, 0x3c).data();
    }  // a small positive number in every type
};

TensorView clip(const GatedLinearRecurrence& call, int64_t element, Layout layout, Memory& memory) {
    const int64_t C = call.H * call.D, pitch = layout == Layout::kGaps ? C + 3 : C;
    const bool sequences_first = layout == Layout::kSequencesFirst;
    TensorView view;
    view.stride[0] = call.N * call.T * pitch;
    view.stride[1] = sequences_first ? pitch : call.N * pitch;
    view.stride[2] = sequences_first ? call.T * pitch : pitch;
    view.stride[3] = 1;
    view.data = memory.take(((call.B * call.N * call.T - 1) * pitch + C) * element);
    return view;
}

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    // B, T, N, H, D; a task has 24 sequences, and eight tasks per head at most add up the gradients.
    const int64_t shapes[][5] = {
        {1, 1, 1, 1, 1}, {2, 2, 3, 2, 5}, {1, 3, 26, 1, 33}, {1, 5, 2, 2, 16}, {2, 1, 110, 1, 3}};
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        const int64_t element = elements[dtype], wide = dtype == 0 ? 8 : 4;
        for (const auto& s : shapes) {
            for (Layout layout : {Layout::kContiguous, Layout::kSequencesFirst, Layout::kGaps}) {
                for (bool carried : {false, true}) {
                    Memory memory;
                    GatedLinearRecurrence call{};
                    call.dtype = static_cast<DType>(dtype), call.num_threads = 2;
                    call.B = s[0], call.T = s[1], call.N = s[2], call.H = s[3], call.D = s[4];
                    const int64_t C = s[3] * s[4], matrix = C * s[4] * wide, kept = s[0] * s[2] * C;
                    call.x = clip(call, element, layout, memory);
                    call.conv_weight = memory.take(4 * C * wide), call.conv_bias = memory.take(C * wide);
                    call.input_weight = memory.take(matrix), call.input_bias = memory.take(C * wide);
                    call.decay_weight = memory.take(matrix), call.decay_bias = memory.take(C * wide);
                    call.rate = memory.take(C * wide);
                    if (carried) call.inputs = memory.take(3 * kept * element), call.hidden = memory.take(kept * wide);
                    call.out = clip(call, element, Layout::kContiguous, memory);
                    call.new_hidden = memory.take(kept * wide);
                    TRITONKERN_ISA::gated_linear_recurrence::forward(call);

                    call.out = clip(call, element, layout, memory);
                    call.grad_out = clip(call, element, layout, memory);
                    if (carried) {
                        call.grad_new_hidden = memory.take(kept * wide);
                        call.grad_inputs = memory.take(3 * kept * element), call.grad_hidden = memory.take(kept * wide);
                    }
                    // Without the gradients of the parameters, or without those of x, too.
                    if (layout != Layout::kGaps) call.grad_x = memory.take(s[1] * kept * element);
                    if (layout != Layout::kSequencesFirst) {
                        call.grad_conv_weight = memory.take(4 * C * wide), call.grad_conv_bias = memory.take(C * wide);
                        call.grad_input_weight = memory.take(matrix), call.grad_input_bias = memory.take(C * wide);
                        call.grad_decay_weight = memory.take(matrix), call.grad_decay_bias = memory.take(C * wide);
                        call.grad_rate = memory.take(C * wide);
                    }
                    TRITONKERN_ISA::gated_linear_recurrence::backward(call);
                    calls += 2;
                }
            }
        }
    }
    std::printf("%d calls\n", calls);
}
