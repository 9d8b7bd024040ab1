// Runs full attention of one instruction set on buffers that end exactly where their tensors end, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch. Shapes cover tails of queries, keys and channels; rows are adjacent or have gaps between them.
#include <cstdio>
#include <vector>

#include "full_attention/call.h"

using namespace tritonkern;

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    // B, L, S, H, D
    const int64_t shapes[][5] = {
        {1, 1, 1, 1, 1}, {2, 5, 7, 3, 8}, {1, 49, 257, 2, 17}, {1, 100, 300, 1, 64}, {1, 7, 40, 2, 130}};
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        for (const auto& s : shapes) {
            for (const int64_t gap : {0, 3}) {
                const int64_t row = s[3] * s[4] + gap, size = elements[dtype];
                const auto buffer = [&](int64_t rows) {
                    return std::vector<unsigned char>(size_t(((rows - 1) * row + s[3] * s[4]) * size), 0x3c);
                };
                auto query = buffer(s[0] * s[1]), key = buffer(s[0] * s[2]), value = key;
                std::vector<unsigned char> out(size_t(s[0] * s[1] * s[3] * s[4] * size));
                std::vector<unsigned char> lse(size_t(s[0] * s[1] * s[3] * (dtype ? 4 : 8)));
                FullAttention call{};
                call.dtype = static_cast<DType>(dtype);
                call.B = s[0], call.L = s[1], call.S = s[2], call.H = s[3], call.D = s[4];
                call.scale = 0.5, call.num_threads = 2;
                const auto view = [&](std::vector<unsigned char>& x, int64_t rows) {
                    TensorView result;
                    result.data = x.data(), result.rank = 4;
                    const int64_t shape[] = {s[0], rows, s[3], s[4]}, stride[] = {rows * row, row, s[4], 1};
                    for (int i = 0; i < 4; ++i) result.shape[i] = shape[i], result.stride[i] = stride[i];
                    return result;
                };
                call.query = view(query, s[1]), call.key = view(key, s[2]), call.value = view(value, s[2]);
                call.out = out.data(), call.lse = lse.data();
                TRITONKERN_ISA::full_attention::forward(call);
                ++calls;
            }
        }
    }
    std::printf("%d calls\n", calls);
}
