// Runs the temporal mixer of one instruction set under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers that end exactly
// where their tensors end. Shapes cover tails of channels, one frame, and tracks of several stretches.
#include <cstdio>
#include <vector>

#include "temporal_mixer/call.h"

using namespace tritonkern;

namespace {

enum class Layout { kContiguous, kTimeFirst, kGaps };

struct Buffer {
    std::vector<unsigned char> bytes;

    explicit Buffer(int64_t size) : bytes(size, 0x3c) {}  // a small positive number in every type
    void* data() { return bytes.data(); }
};

// Bytes of [B, N, T, C] up to its last number; the view lacks its address.
int64_t lay_out(const TemporalMixer& call, int64_t element, Layout layout, TensorView& view) {
    const int64_t pitch = layout == Layout::kGaps ? call.C + 3 : call.C;
    const bool time_first = layout == Layout::kTimeFirst;
    view.stride[0] = call.N * call.T * pitch;
    view.stride[1] = time_first ? pitch : call.T * pitch;
    view.stride[2] = time_first ? call.N * pitch : pitch;
    return ((call.B * call.N * call.T - 1) * pitch + call.C) * element;
}

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    // B, N, T, C; a stretch has 8 to 32 frames, as many as make 16384 numbers.
    const int64_t shapes[][4] = {{1, 1, 1, 1},  {2, 3, 5, 7},     {1, 2, 70, 24},
                                 {1, 5, 2, 41}, {1, 1, 19, 2051}, {1, 40, 3, 9}};
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        const int64_t element = elements[dtype], wide = dtype == 0 ? 8 : 4;
        for (const auto& s : shapes) {
            for (Layout layout : {Layout::kContiguous, Layout::kTimeFirst, Layout::kGaps}) {
                for (int mode = 0; mode < 3; ++mode) {  // offline, causal, causal with a state
                    TemporalMixer call{};
                    call.dtype = static_cast<DType>(dtype), call.eps = 1e-6, call.num_threads = 2;
                    call.B = s[0], call.N = s[1], call.T = s[2], call.C = s[3], call.causal = mode > 0;
                    Buffer x(lay_out(call, element, layout, call.x)), out(s[0] * s[1] * s[2] * s[3] * element);
                    Buffer grad_out(lay_out(call, element, layout, call.grad_out)), grad_x = out;
                    call.x.data = x.data(), call.grad_out.data = grad_out.data(), call.out = out.data();

                    Buffer norm_weight(s[3] * wide), conv1_weight(12 * s[3] * wide), conv1_bias(4 * s[3] * wide);
                    Buffer conv2_weight = conv1_weight, conv2_bias = conv1_bias;
                    call.norm_weight = norm_weight.data();
                    call.conv1_weight = conv1_weight.data(), call.conv1_bias = conv1_bias.data();
                    call.conv2_weight = conv2_weight.data(), call.conv2_bias = conv2_bias.data();

                    const int64_t of_state = s[0] * s[1] * 2 * s[3] * wide;
                    Buffer normed_state(of_state), hidden_state(4 * of_state);
                    Buffer new_normed_state = normed_state, new_hidden_state = hidden_state;
                    if (mode == 2) {
                        call.normed_state = normed_state.data(), call.hidden_state = hidden_state.data();
                        call.new_normed_state = new_normed_state.data();
                        call.new_hidden_state = new_hidden_state.data();
                    }
                    TRITONKERN_ISA::temporal_mixer::forward(call);

                    call.normed_state = call.hidden_state = call.conv2_bias = nullptr;
                    call.new_normed_state = call.new_hidden_state = nullptr;
                    Buffer sums(kMixerSums * s[3] * wide);
                    // Offline both gradients; causal one of them, and with a state the other.
                    call.grad_x = mode == 1 ? nullptr : grad_x.data();
                    call.sums = mode == 2 ? nullptr : sums.data();
                    TRITONKERN_ISA::temporal_mixer::backward(call);
                    calls += 2;
                }
            }
        }
    }
    std::printf("%d calls\n", calls);
}
