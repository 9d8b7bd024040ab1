// Bindings of the temporal adapter. An image is a tensor [B, T, h, w, C], or, stored patch after patch, [B, T, h/p, w/p, p, p * C].
#include "common/bindings.h"

#include <string>

#include "temporal_adapter/call.h"

namespace tritonkern {
namespace {

ImageView image_view(const char* name, const TensorView& x) {
    if (x.rank != 6) expect_rank(name, x, 5);
    if (!x.on_cpu) throw std::invalid_argument(std::string(name) + " must be on the CPU");
    expect_floating(name, x);
    if (x.stride[x.rank - 1] != 1) throw std::invalid_argument(std::string(name) + " must have adjacent channels");
    ImageView image;
    image.data = x.data, image.dtype = x.dtype, image.batch = x.stride[0], image.frame = x.stride[1];
    image.row[0] = x.stride[2], image.column[0] = x.stride[3];
    if (x.rank == 6) {
        image.patch = x.shape[4], image.row[1] = x.stride[4];
        if (image.patch == 0 || x.shape[5] % image.patch)
            throw std::invalid_argument(std::string(name) + " must have p * C numbers on its last axis, got shape " +
                                        text_of(x.rank, x.shape));
        image.column[1] = x.shape[5] / image.patch;
    }
    return image;
}

ImageView optional_image(const char* name, const TensorView& x) {
    return x.rank < 0 ? ImageView{} : image_view(name, x);
}

struct ImageSize {
    int64_t B, T, h, w, C;
};

ImageSize size_of(const TensorView& x) {
    const int64_t patch = x.rank == 6 ? x.shape[4] : 1;
    return {x.shape[0], x.shape[1], x.shape[2] * patch, x.shape[3] * patch, x.shape[x.rank - 1] / patch};
}

// Throws unless `x` (if it is there) is an image of this size.
void expect_size(const char* name, const TensorView& x, const ImageSize& size) {
    if (x.rank < 0) return;
    const ImageSize own = size_of(x);
    if (own.B != size.B || own.T != size.T || own.h != size.h || own.w != size.w || own.C != size.C)
        throw std::invalid_argument(std::string(name) + " is an image of another size: shape " +
                                    text_of(x.rank, x.shape));
}

AdapterShape adapter_shape(const ImageSize& size, int num_threads) {
    return {size.B, size.T, size.h, size.w, num_threads};
}

// Tiles of 2 are for images in the type of the accumulator, tiles of 4 for all but float64.
void expect_tile(const char* name, int tile, const TensorView& image) {
    const bool wide = image.dtype == accumulator(image.dtype), single = accumulator(image.dtype) == DType::kFloat32;
    if (!(tile == 2 && wide) && !(tile == 4 && single))
        throw std::invalid_argument("tile " + std::to_string(tile) + " does not fit " + name + ", which is " +
                                    name_of(image.dtype));
}

// `mask` belongs to "masked", scale and shift [B, C] to "affine".
Source source_view(const char* name, const TensorView& image, const std::string& load, const TensorView& mask,
                   const TensorView& scale, const TensorView& shift) {
    Source source{image_view(name, image), Load::kPlain, {}, nullptr, nullptr};
    const ImageSize size = size_of(image);
    const DType wide = accumulator(image.dtype);
    if (load == "affine") {
        source.load = Load::kAffine;
        expect("scale", scale, wide, {size.B, size.C}), expect_contiguous("scale", scale);
        expect("shift", shift, wide, {size.B, size.C}), expect_contiguous("shift", shift);
        source.scale = scale.data, source.shift = shift.data;
    } else if (load == "relu") {
        source.load = Load::kRelu;
        expect_dtype(name, image, wide);
    } else if (load == "masked") {
        source.load = Load::kMasked;
        source.mask = image_view("mask", mask);
        expect_size("mask", mask, size), expect_dtype("mask", mask, wide), expect_dtype(name, image, wide);
    } else if (load != "plain") {
        throw std::invalid_argument("load must be plain, affine, relu or masked, got " + load);
    }
    return source;
}

// [B, C] or [B] in float64
double* doubles(const char* name, const TensorView& x, std::initializer_list<int64_t> shape) {
    expect(name, x, DType::kFloat64, shape), expect_contiguous(name, x);
    return static_cast<double*>(x.data);
}

void statistics(const TensorView& image, double eps, int num_threads, const TensorView& mean, const TensorView& rstd) {
    const ImageView view = image_view("image", image);
    const ImageSize size = size_of(image);
    TRITONKERN_KERNEL(temporal_adapter, statistics)
    ({adapter_shape(size, num_threads), size.C, eps, view, doubles("mean", mean, {size.B}),
      doubles("rstd", rstd, {size.B})});
}

GroupNormBackward norm_backward(const TensorView& image, const TensorView& grad, int num_threads) {
    GroupNormBackward call{};
    call.image = image_view("image", image), call.grad = image_view("grad", grad);
    const ImageSize size = size_of(image);
    expect_size("grad", grad, size), expect_dtype("grad", grad, accumulator(image.dtype));
    call.shape = adapter_shape(size, num_threads), call.C = size.C;
    return call;
}

void sums(const TensorView& image, const TensorView& grad, const TensorView& mean, int num_threads,
          const TensorView& sums, const TensorView& moments) {
    GroupNormBackward call = norm_backward(image, grad, num_threads);
    call.mean = doubles("mean", mean, {call.shape.B});
    call.sums = doubles("sums", sums, {call.shape.B, call.C});
    call.moments = doubles("moments", moments, {call.shape.B, call.C});
    TRITONKERN_KERNEL(temporal_adapter, sums)(call);
}

void norm_gradient(const TensorView& image, const TensorView& grad, const TensorView& slope, const TensorView& scale,
                   const TensorView& shift, int num_threads, const TensorView& grad_image) {
    GroupNormBackward call = norm_backward(image, grad, num_threads);
    const DType wide = accumulator(image.dtype);
    expect("slope", slope, wide, {call.shape.B, call.C}), expect_contiguous("slope", slope);
    expect("scale", scale, wide, {call.shape.B}), expect_contiguous("scale", scale);
    expect("shift", shift, wide, {call.shape.B}), expect_contiguous("shift", shift);
    call.slope = slope.data, call.scale = scale.data, call.shift = shift.data;
    call.grad_image = image_view("grad_image", grad_image);
    expect_size("grad_image", grad_image, size_of(image)), expect_dtype("grad_image", grad_image, image.dtype);
    TRITONKERN_KERNEL(temporal_adapter, norm_gradient)(call);
}

void conv3x3(const TensorView& source, const std::string& load, const TensorView& mask, const TensorView& scale,
             const TensorView& shift, const TensorView& weight, const TensorView& bias, bool relu,
             const TensorView& residual, const TensorView& out_mask, int tile, int num_threads, const TensorView& out) {
    Conv3x3 call{};
    call.source = source_view("source", source, load, mask, scale, shift);
    const ImageSize size = size_of(source);
    const DType wide = accumulator(source.dtype);
    expect_rank("weight", weight, 4);
    expect("weight", weight, wide, {weight.shape[0], size.C, 3, 3});
    call.shape = adapter_shape(size, num_threads), call.C = size.C, call.O = weight.shape[0];
    expect_tile("source", tile, source), expect_tile("out", tile, out);
    call.tile = tile, call.weight = weight.data, call.relu = relu;
    for (int i = 0; i < 4; ++i) call.weight_stride[i] = weight.stride[i];
    if (bias.rank >= 0) {
        expect("bias", bias, wide, {call.O}), expect_contiguous("bias", bias);
        call.bias = bias.data;
    }
    const ImageSize result{size.B, size.T, size.h, size.w, call.O};
    call.out = image_view("out", out), expect_size("out", out, result);
    call.residual = optional_image("residual", residual), expect_size("residual", residual, result);
    if (residual.rank >= 0) expect_dtype("residual", residual, out.dtype);
    call.mask = optional_image("out_mask", out_mask), expect_size("out_mask", out_mask, result);
    if (out_mask.rank >= 0) expect_dtype("out_mask", out_mask, wide);
    TRITONKERN_KERNEL(temporal_adapter, conv3x3)(call);
}

// `load` of the source is affine or relu; the gradient of the results is masked if there is a mask, else plain.
void conv3x3_weight_gradient(const TensorView& source, const std::string& load, const TensorView& scale,
                             const TensorView& shift, const TensorView& grad_out, const TensorView& mask, int tile,
                             int num_threads, const TensorView& grad_weight, const TensorView& grad_bias) {
    Conv3x3WeightGradient call{};
    const TensorView none;
    call.source = source_view("source", source, load, none, scale, shift);
    call.grad_out = source_view("grad_out", grad_out, mask.rank < 0 ? "plain" : "masked", mask, none, none);
    const ImageSize size = size_of(source), of_grad = size_of(grad_out);
    const DType wide = accumulator(source.dtype);
    call.shape = adapter_shape(size, num_threads), call.C = size.C, call.O = of_grad.C;
    expect_size("grad_out", grad_out, {size.B, size.T, size.h, size.w, of_grad.C});
    expect_tile("source", tile, source), expect_tile("grad_out", tile, grad_out);
    call.tile = tile;
    expect("grad_weight", grad_weight, wide, {call.O, call.C, 3, 3}), expect_contiguous("grad_weight", grad_weight);
    expect("grad_bias", grad_bias, wide, {call.O}), expect_contiguous("grad_bias", grad_bias);
    call.grad_weight = grad_weight.data, call.grad_bias = grad_bias.data;
    TRITONKERN_KERNEL(temporal_adapter, conv3x3_weight_gradient)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("temporal_adapter_statistics", statistics, arg("image"), arg("eps"), arg("num_threads"), arg("mean"),
          arg("rstd"), Unlocked());
    m.def("temporal_adapter_sums", sums, arg("image"), arg("grad"), arg("mean"), arg("num_threads"), arg("sums"),
          arg("moments"), Unlocked());
    m.def("temporal_adapter_norm_gradient", norm_gradient, arg("image"), arg("grad"), arg("slope"), arg("scale"),
          arg("shift"), arg("num_threads"), arg("grad_image"), Unlocked());
    m.def("temporal_adapter_conv3x3", conv3x3, arg("source"), arg("load"), arg("mask"), arg("scale"), arg("shift"),
          arg("weight"), arg("bias"), arg("relu"), arg("residual"), arg("out_mask"), arg("tile"), arg("num_threads"),
          arg("out"), Unlocked());
    m.def("temporal_adapter_conv3x3_weight_gradient", conv3x3_weight_gradient, arg("source"), arg("load"), arg("scale"),
          arg("shift"), arg("grad_out"), arg("mask"), arg("tile"), arg("num_threads"), arg("grad_weight"),
          arg("grad_bias"), Unlocked());
}

}  // namespace tritonkern
