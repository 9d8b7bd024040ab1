// Runs the temporal adapter's kernels of one instruction set as its operators do, on buffers that end exactly where their tensors end,
// for AddressSanitizer and UndefinedBehaviorSanitizer to watch. Shapes cover tails of channels, tiles and patches, one pixel, and more
// tiles than a block holds.
#include <cstdio>
#include <vector>

#include "temporal_adapter/call.h"

using namespace tritonkern;

namespace {

int64_t size_of(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct Buffer {
    std::vector<unsigned char> bytes;

    explicit Buffer(int64_t size) : bytes(size, 0x3c) {}  // a small positive number in every type
    Buffer(int64_t count, DType dtype) : Buffer(count * size_of(dtype)) {}
    template <class X>
    operator X*() {
        return reinterpret_cast<X*>(bytes.data());
    }
};

struct Image : Buffer {
    ImageView view;

    Image(int64_t count, DType dtype) : Buffer(count, dtype) {}
    operator ImageView() const { return view; }
};

// Two rows of no pixel before those of every frame, and `gap` numbers between rows.
Image tokens(const AdapterShape& s, int64_t C, DType dtype, int64_t gap) {
    const int64_t pitch = C + gap, frame = (2 + s.h * s.w) * pitch;
    Image image(s.B * s.T * frame - gap, dtype);
    image.view = {
        image.bytes.data() + 2 * pitch * size_of(dtype), dtype, 1, s.T * frame, frame, {s.w * pitch, 0}, {pitch, 0}};
    return image;
}

Image patches(const AdapterShape& s, int64_t O, DType dtype, int64_t side) {
    const int64_t patch = side * side * O, frame = s.h * s.w * O;
    Image image(s.B * s.T * frame, dtype);
    image.view = {image.bytes.data(), dtype, side, s.T * frame, frame, {s.w / side * patch, side * O}, {patch, O}};
    return image;
}

}  // namespace

int main() {
    // Type of tokens, and side of Winograd's tiles
    const struct {
        DType dtype;
        int tile;
    } kinds[] = {
        {DType::kFloat64, 2}, {DType::kFloat32, 2}, {DType::kFloat32, 4}, {DType::kBFloat16, 4}, {DType::kFloat16, 4}};
    // B, T, h, w, C, O, side of patches, gap
    const int64_t shapes[][8] = {{1, 1, 1, 1, 1, 1, 1, 0},
                                 {2, 3, 5, 7, 9, 5, 1, 2},
                                 {2, 1, 6, 4, 24, 10, 2, 0},
                                 {1, 1, 9, 12, 40, 33, 3, 5},
                                 {1, 3, 41, 43, 70, 37, 1, 1}};
    int calls = 0;
    for (const auto& kind : kinds) {
        const DType dtype = kind.dtype, wide = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
        for (const auto& s : shapes) {
            const AdapterShape shape{s[0], s[1], s[2], s[3], 2};
            const int64_t B = s[0], C = s[4], O = s[5], side = s[6], gap = s[7];
            Image x = tokens(shape, C, dtype, gap), out = tokens(shape, C, dtype, gap);
            Image grad_x = tokens(shape, C, dtype, gap), grad_out = tokens(shape, C, dtype, gap);
            Image hidden = patches(shape, O, wide, side), grad_hidden = patches(shape, O, wide, side);
            Image grad_normed = tokens(shape, C, wide, gap);
            Buffer mean(B * 8), rstd(B * 8), sums(B * C * 8), moments(B * C * 8);
            Buffer slope(B * C, wide), shift(B * C, wide), scale_of_image(B, wide), shift_of_image(B, wide);
            Buffer weight(O * C * 9, wide), bias_in(O, wide), bias_out(C, wide);
            const Source normed{x, Load::kAffine, {}, slope, shift};
            const Source rectified{hidden, Load::kRelu, {}, nullptr, nullptr};
            const Source plain{grad_out, Load::kPlain, {}, nullptr, nullptr};
            const Source masked{grad_hidden, Load::kMasked, hidden, nullptr, nullptr};

            Conv3x3 in{shape, C, O, kind.tile, normed, weight, {C * 9, 9, 3, 1}, bias_in, true, {}, {}, hidden};
            TRITONKERN_ISA::temporal_adapter::statistics({shape, C, 1e-5, x, mean, rstd});
            TRITONKERN_ISA::temporal_adapter::conv3x3(in);
            in.source = plain, in.bias = nullptr, in.relu = false, in.mask = hidden, in.out = grad_hidden;
            TRITONKERN_ISA::temporal_adapter::conv3x3(in);
            Conv3x3 back{shape, O, C, kind.tile, rectified, weight, {9, C * 9, 3, 1}, bias_out, false, x, {}, out};
            TRITONKERN_ISA::temporal_adapter::conv3x3(back);
            back.source = masked, back.bias = nullptr, back.residual = {}, back.out = grad_normed;
            TRITONKERN_ISA::temporal_adapter::conv3x3(back);
            Buffer grad_weight(O * C * 9, wide), grad_in(O, wide), grad_back(C, wide);
            TRITONKERN_ISA::temporal_adapter::conv3x3_weight_gradient(
                {shape, C, O, kind.tile, normed, masked, grad_weight, grad_in});
            TRITONKERN_ISA::temporal_adapter::conv3x3_weight_gradient(
                {shape, O, C, kind.tile, rectified, plain, grad_weight, grad_back});
            const GroupNormBackward norm{
                shape, C, x, grad_normed, mean, sums, moments, slope, scale_of_image, shift_of_image, grad_x};
            TRITONKERN_ISA::temporal_adapter::sums(norm);
            TRITONKERN_ISA::temporal_adapter::norm_gradient(norm);
            calls += 9;
        }
    }
    std::printf("%d calls\n", calls);
}
