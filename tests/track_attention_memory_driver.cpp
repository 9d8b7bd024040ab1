// Runs track attention of one instruction set on buffers that end exactly where their tensors end, for AddressSanitizer and
// UndefinedBehaviorSanitizer to watch. Shapes cover tails of head dim and lists, no track, one cell, and no bound; positions
// are far away, NaN and infinite too.
#include <cmath>
#include <cstdio>
#include <vector>

#include "track_attention/call.h"

using namespace tritonkern;

namespace {

struct Buffer {
    std::vector<unsigned char> bytes;
    TensorView view;

    Buffer(const int64_t (&shape)[6], int64_t element, int64_t channel_stride) {
        int64_t stride = channel_stride, last = 0, numel = 1;
        for (int axis = 5; axis >= 0; --axis) {
            view.stride[axis] = stride;
            last += (shape[axis] - 1) * stride;
            stride *= shape[axis], numel *= shape[axis];
        }
        bytes.assign(numel ? (last + 1) * element : 0, 0x3c);  // a small positive number in every type
        view.data = bytes.data();
    }
};

template <class A>
std::vector<A> places(int64_t count, int64_t height, int64_t width) {
    std::vector<A> xy;
    for (int64_t i = 0; i < count; ++i) {
        const A x = A(i * 37 % 101) / 90 * A(width), y = A(i * 53 % 97) / 90 * A(height);
        xy.push_back(i % 7 == 3 ? A(1e30) : i % 13 == 6 ? A(NAN) : x);
        xy.push_back(i % 11 == 5 ? A(-1e3) : i % 17 == 9 ? A(INFINITY) : y);
    }
    return xy;
}

}  // namespace

int main() {
    const int64_t elements[] = {8, 4, 2, 2};
    // B, T, M, height, width, H, D
    const int64_t shapes[][7] = {{1, 9, 40, 7, 9, 2, 24},
                                 {2, 1, 0, 3, 3, 1, 8},
                                 {1, 1, 1, 1, 1, 1, 8},
                                 {1, 2, 300, 5, 1, 1, 40},
                                 {1, 1, 70, 9, 9, 2, 256}};
    const double inverse_variances[] = {2, 0, 3e38, -1, NAN};
    int calls = 0;
    for (int dtype = 0; dtype < 4; ++dtype) {
        for (const auto& s : shapes) {
            for (double inverse_variance : inverse_variances) {
                for (int mode = 0; mode < 8; ++mode) {
                    const bool splat = mode & 1, culling = mode & 2, all_visible = mode & 4;
                    const int64_t gap = mode & 4 ? 3 : 1, element = elements[dtype], wide = dtype == 0 ? 8 : 4;
                    const int64_t of_tracks[6] = {s[0], s[1], 1, s[2], s[5], s[6]};
                    const int64_t of_grid[6] = {s[0], s[1], s[3], s[4], s[5], s[6]};
                    const auto& rows = splat ? of_grid : of_tracks;
                    const auto& columns = splat ? of_tracks : of_grid;
                    Buffer query(rows, element, gap), grad_out(rows, element, gap);
                    Buffer key(columns, element, gap), value(columns, element, gap);
                    Buffer out(rows, element, 1), grad_query(rows, element, 1);
                    Buffer grad_key(columns, element, 1), grad_value(columns, element, 1);
                    const int64_t of_places[6] = {s[0], s[1], 1, s[2], 1, 2}, one[6] = {1, 1, 1, 1, 1, 1};
                    Buffer grad_tracks(of_places, wide, 1), grad_inverse_variance(one, wide, 1);
                    const int64_t tracks = s[0] * s[1] * s[2];
                    const auto xy64 = places<double>(tracks, s[3], s[4]);
                    const auto xy32 = places<float>(tracks, s[3], s[4]);
                    std::vector<unsigned char> visible(tracks);
                    for (int64_t i = 0; i < tracks; ++i) visible[i] = i % 5 != 2;

                    TrackAttention call{};
                    call.dtype = static_cast<DType>(dtype);
                    call.B = s[0], call.T = s[1], call.M = s[2], call.height = s[3], call.width = s[4];
                    call.H = s[5], call.D = s[6], call.scale = 0.125, call.inverse_variance = inverse_variance;
                    call.splat = splat, call.culling = culling, call.num_threads = 2;
                    call.query = query.view, call.key = key.view, call.value = value.view;
                    call.tracks = dtype == 0 ? static_cast<const void*>(xy64.data()) : xy32.data();
                    call.visible = all_visible ? nullptr : reinterpret_cast<const bool*>(visible.data());
                    call.out = out.view;
                    TRITONKERN_ISA::track_attention::forward(call);
                    call.grad_out = grad_out.view, call.grad_query = grad_query.view;
                    call.grad_key = grad_key.view, call.grad_value = grad_value.view;
                    call.grad_tracks = grad_tracks.view.data;
                    call.grad_inverse_variance = grad_inverse_variance.view.data;
                    TRITONKERN_ISA::track_attention::backward(call);
                    calls += 2;
                }
            }
        }
    }
    std::printf("%d calls\n", calls);
}
