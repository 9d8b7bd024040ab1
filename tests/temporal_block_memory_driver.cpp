// Runs the temporal block of one instruction set on buffers that end exactly where their tensors end, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch. Shapes cover heads narrower than a vector, channels and positions that no panel and no
// group divides, windows longer than the clip, and clips that are cut in time.
#include <cstdio>
#include <vector>

#include "temporal_block/call.h"

using namespace tritonkern;

namespace {

struct Buffer {
    std::vector<unsigned char> bytes;

    explicit Buffer(int64_t size) : bytes(size, 0x3c) {}  // a small positive number in every type
    void* data(bool wanted = true) { return wanted ? bytes.data() : nullptr; }
};

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    // B, T, N, C, H, left, right
    const int64_t shapes[][7] = {{1, 1, 1, 8, 1, 0, 0},  {2, 5, 7, 8, 1, 6, 6},    {1, 24, 9, 32, 4, 6, 6},
                                 {1, 3, 2, 48, 2, 9, 1}, {1, 300, 2, 40, 5, 6, 0}, {1, 150, 1, 72, 3, 20, 31}};
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        for (const auto& s : shapes) {
            for (int biases = 0; biases < 2; ++biases) {
                const int64_t C = s[3], wide = dtype == 0 ? 8 : 4, size = s[0] * s[1] * s[2] * C * elements[dtype];
                TemporalBlock call{};
                call.dtype = static_cast<DType>(dtype);
                call.B = s[0], call.T = s[1], call.N = s[2], call.C = C, call.H = s[4];
                call.left = s[5], call.right = s[6], call.eps = 1e-5, call.num_threads = 2;
                // Positions lie outermost.
                call.stride[0] = s[1] * C, call.stride[1] = C, call.stride[2] = s[0] * s[1] * C;
                Buffer x(size), out(size), norm(C * wide), qkv(3 * C * C * wide), three(3 * C * wide);
                Buffer proj(C * C * wide), one(C * wide);
                call.x = x.data(), call.out = out.data(), call.norm_weight = norm.data(), call.norm_bias = norm.data();
                call.qkv_weight = qkv.data(), call.qkv_bias = three.data(biases);
                call.proj_weight = proj.data(), call.proj_bias = one.data(biases);
                TRITONKERN_ISA::temporal_block_forward(call);
                ++calls;
            }
        }
    }
    std::printf("%d calls\n", calls);
}
