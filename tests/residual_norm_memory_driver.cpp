// Runs the residual sum with its LayerNorm of one instruction set on buffers that end exactly where their tensors end, for
// AddressSanitizer and UndefinedBehaviorSanitizer to watch. Shapes cover tails of channels and of chunks; every input and every result
// that may be absent is absent in some calls.
#include <cstdio>
#include <vector>

#include "residual_norm/call.h"

using namespace tritonkern;

namespace {

struct Buffer {
    std::vector<unsigned char> bytes;

    explicit Buffer(int64_t size) : bytes(size, 0x3c) {}  // a small positive number in every type
    void* data(bool wanted = true) { return wanted ? bytes.data() : nullptr; }
};

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2}, chunk = 64;
    // dtypes of x, branch and result: one for all, or 16 bits beside a float32 residual stream
    const int dtypes[][3] = {{0, 0, 0}, {1, 1, 1}, {2, 2, 2}, {3, 3, 3}, {1, 2, 3}, {1, 3, 1}, {1, 1, 2}};
    // rows, C
    const int64_t shapes[][2] = {{1, 1}, {5, 7}, {64, 24}, {65, 130}, {130, 41}, {3, 1027}};
    int calls = 0;
    for (const auto& types : dtypes) {
        for (const auto& s : shapes) {
            for (int mode = 0; mode < 64; ++mode) {
                const int64_t numel = s[0] * s[1], wide = types[0] == 0 ? 8 : 4;
                const int64_t of_x = numel * elements[types[0]], of_branch = numel * elements[types[1]];
                const int64_t of_out = numel * elements[types[2]], of_parameter = s[1] * wide;
                const bool has_branch = mode & 1;
                ResidualNorm call{};
                call.dtype = static_cast<DType>(types[0]), call.branch_dtype = static_cast<DType>(types[1]);
                call.out_dtype = static_cast<DType>(types[2]);
                call.rows = s[0], call.C = s[1], call.eps = 1e-6, call.num_threads = 2;
                Buffer x(of_x), branch(of_branch), gamma(of_parameter), weight = gamma, bias = gamma;
                call.x = x.data(), call.branch = branch.data(has_branch),
                call.gamma = gamma.data(has_branch && mode & 2);
                call.weight = weight.data(mode & 4), call.bias = bias.data(mode & 8);
                Buffer sum(of_x), normed(of_out);
                call.sum = sum.data(has_branch), call.normed = normed.data();
                TRITONKERN_ISA::residual_norm_forward(call);

                Buffer grad_sum(of_x), grad_normed(of_out), grad_x(of_x), grad_branch(of_branch);
                Buffer partial((s[0] + chunk - 1) / chunk * 3 * of_parameter);
                call.chunk = chunk;
                call.grad_sum = grad_sum.data(mode & 16), call.grad_normed = grad_normed.data(mode & 32);
                call.grad_x = grad_x.data(mode & 2), call.grad_branch = grad_branch.data(mode & 4);
                call.partial = partial.data(mode & 8);
                TRITONKERN_ISA::residual_norm_backward(call);
                calls += 2;
            }
        }
    }
    std::printf("%d calls\n", calls);
}
