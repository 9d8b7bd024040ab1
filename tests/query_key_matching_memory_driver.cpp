// Runs query-key matching and the two operations beside it, of one instruction set, on buffers that end exactly where their
// tensors end, for AddressSanitizer and UndefinedBehaviorSanitizer to watch. Shapes cover tails of cells, heads and channels; rows
// are adjacent or have gaps between them.
#include <cstdio>
#include <vector>

#include "query_key_matching/call.h"

using namespace tritonkern;
using Bytes = std::vector<unsigned char>;

namespace {

// [leading..., H, D] of rows that are `gap` numbers apart.
TensorView rows(Bytes& bytes, DType dtype, std::initializer_list<int64_t> leading, int64_t H, int64_t D, int64_t gap) {
    const int64_t element = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    TensorView view;
    view.dtype = dtype, view.on_cpu = true, view.rank = int(leading.size()) + 2;
    int axis = 0;
    int64_t count = 1;
    for (const int64_t size : leading) view.shape[axis++] = size, count *= size;
    view.shape[axis] = H, view.shape[axis + 1] = D, view.stride[axis] = D, view.stride[axis + 1] = 1;
    int64_t stride = H * D + gap;
    while (axis-- > 0) view.stride[axis] = stride, stride *= view.shape[axis];
    bytes.assign(size_t(((count - 1) * (H * D + gap) + H * D) * element), 0x3c);
    view.data = bytes.data();
    return view;
}

int matching(DType dtype, const int64_t* s, int64_t gap, bool chosen, bool symmetric) {
    const int64_t B = s[0], T = s[1], S = s[2] * s[3], H = s[4], D = s[5], M = chosen ? 2 : S;
    const int64_t real = dtype == DType::kFloat64 ? 8 : 4, element = dtype == DType::kFloat64   ? 8
                                                                     : dtype == DType::kFloat32 ? 4
                                                                                                : 2;
    Bytes query, key;
    QueryKeyMatching call{};
    call.dtype = dtype, call.B = B, call.T = T, call.S = S, call.H = H, call.D = D, call.M = M;
    call.source = T - 1, call.height = s[2], call.width = s[3];
    call.scale = 0.5, call.limit = 4, call.symmetric = symmetric, call.num_threads = 2;
    call.query = rows(query, dtype, {B, T, S}, H, D, gap), call.key = rows(key, dtype, {B, T, S}, H, D, gap);
    std::vector<int64_t> cells(size_t(B * M), S - 1), index(size_t(B * T * M));
    if (chosen) call.cells = cells.data();
    Bytes peak(size_t(B * T * M * real)), points(2 * peak.size()), weight(peak.size()), cost(peak.size() * size_t(S));
    Bytes grad_query(size_t(B * T * S * H * D * element)), grad_key(grad_query.size());
    QueryKeyMatching forward = call, backward = call;
    forward.index = index.data(), forward.peak = peak.data(), forward.points = points.data(),
    forward.weight = weight.data();
    TRITONKERN_ISA::query_key_matching::forward(forward);
    backward.index = index.data(), backward.points = points.data(), backward.weight = weight.data();
    Bytes grad_peak(peak.size(), 0x3c), grad_points(points.size(), 0x3c), grad_cost(cost.size(), 0x3c);
    backward.grad_peak = grad_peak.data(), backward.grad_points = grad_points.data();
    backward.grad_query = grad_query.data(), backward.grad_key = grad_key.data();
    TRITONKERN_ISA::query_key_matching::backward(backward);
    QueryKeyMatching of_cost = call;
    of_cost.cost = cost.data();
    TRITONKERN_ISA::query_key_matching::forward(of_cost);
    of_cost.cost = nullptr, of_cost.grad_cost = grad_cost.data();
    of_cost.grad_query = grad_query.data(), of_cost.grad_key = grad_key.data();
    TRITONKERN_ISA::query_key_matching::backward(of_cost);
    return 4;
}

int beside(DType dtype, const int64_t* s, int64_t gap, bool masked) {
    const int64_t B = s[0], N = s[1] + 2, J = s[2] * s[3] * 2 + 1, H = s[4], D = s[5], G = 2;
    const int64_t real = dtype == DType::kFloat64 ? 8 : 4, element = dtype == DType::kFloat64   ? 8
                                                                     : dtype == DType::kFloat32 ? 4
                                                                                                : 2;
    Bytes of_rows, of_key, of_value;
    RowStatistics call{};
    call.dtype = dtype, call.B = B, call.N = N, call.J = J, call.H = H, call.D = D, call.G = G;
    call.scale = 0.5, call.num_threads = 2;
    call.rows = rows(of_rows, dtype, {B, N}, H, D, gap), call.key = rows(of_key, dtype, {B, J}, H, D, gap);
    const Bytes mask(size_t(B * J), 1);
    const int64_t segments[] = {0, J, J - 1, J};
    if (masked) call.mask = reinterpret_cast<const bool*>(mask.data());
    call.segments = segments;
    Bytes maximum(size_t(B * N * G * real)), sum(maximum.size());
    call.maximum = maximum.data(), call.sum = sum.data();
    TRITONKERN_ISA::query_key_matching::row_statistics(call);

    FrameLocalAttention attention{};
    attention.dtype = dtype, attention.B = B, attention.n = J, attention.H = H, attention.D = D;
    attention.text = 1, attention.frames = 2, attention.text_last = masked, attention.renormalise = masked;
    attention.scale = 0.5, attention.num_threads = 2;
    Bytes query;
    attention.query = rows(query, dtype, {B, J}, H, D, gap), attention.key = call.key;
    attention.value = rows(of_value, dtype, {B, J}, H, D, gap);
    Bytes out(size_t(B * J * H * D * element));
    attention.out = out.data();
    TRITONKERN_ISA::query_key_matching::frame_local_attention(attention);
    return 2;
}

}  // namespace

int main() {
    // B, T, h, w, H, D
    const int64_t shapes[][6] = {{1, 1, 1, 2, 1, 1}, {2, 3, 3, 5, 3, 8}, {1, 2, 7, 9, 2, 17}, {1, 2, 4, 5, 2, 130}};
    int calls = 0;
    for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16})
        for (const auto& shape : shapes)
            for (const int64_t gap : {0, 3})
                for (const bool flag : {false, true})
                    calls += matching(dtype, shape, gap, flag, !flag) + matching(dtype, shape, gap, flag, flag) +
                             beside(dtype, shape, gap, flag);
    std::printf("%d calls\n", calls);
}
