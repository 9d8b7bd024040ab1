// The Python face of the temporal adapter's kernels. An image is (pointer, strides, patch, dtype) with the strides of
// `ImageView` in its order; a source is (image, load, mask or None, scale, shift).
#include "common/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "temporal_adapter/call.h"

namespace tritonkern {

using PyImage = std::tuple<uintptr_t, std::array<int64_t, 6>, int64_t, int>;
using PySource = std::tuple<PyImage, int, std::optional<PyImage>, uintptr_t, uintptr_t>;
using PyAdapterShape = std::array<int64_t, 4>;

inline ImageView image_view(const std::optional<PyImage>& image) {
    if (!image) return {};
    const auto& [data, stride, patch, dtype] = *image;
    return {reinterpret_cast<void*>(data), DType(dtype),          patch, stride[0], stride[1],
            {stride[2], stride[3]},        {stride[4], stride[5]}};
}

inline Source source_view(const PySource& source) {
    const auto& [image, load, mask, scale, shift] = source;
    return {image_view(image), Load(load), image_view(mask), reinterpret_cast<const void*>(scale),
            reinterpret_cast<const void*>(shift)};
}

inline AdapterShape adapter_shape(const PyAdapterShape& shape, int num_threads) {
    return {shape[0], shape[1], shape[2], shape[3], num_threads};
}

TRITONKERN_BINDINGS(m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def(
        "group_norm_statistics",
        [=](const PyAdapterShape& shape, int num_threads, int64_t channels, double eps, const PyImage& image,
            uintptr_t mean, uintptr_t rstd) {
            TRITONKERN_OLD_KERNEL(group_norm_statistics)({adapter_shape(shape, num_threads), channels, eps,
                                                          image_view(image), reinterpret_cast<double*>(mean),
                                                          reinterpret_cast<double*>(rstd)});
        },
        unlocked);
    m.def(
        "group_norm_sums",
        [=](const PyAdapterShape& shape, int num_threads, int64_t channels, const PyImage& image, const PyImage& grad,
            uintptr_t mean, uintptr_t sums, uintptr_t moments) {
            GroupNormBackward call{};
            call.shape = adapter_shape(shape, num_threads), call.C = channels;
            call.image = image_view(image), call.grad = image_view(grad);
            call.mean = reinterpret_cast<const double*>(mean);
            call.sums = reinterpret_cast<double*>(sums), call.moments = reinterpret_cast<double*>(moments);
            TRITONKERN_OLD_KERNEL(group_norm_sums)(call);
        },
        unlocked);
    m.def(
        "group_norm_gradient",
        [=](const PyAdapterShape& shape, int num_threads, int64_t channels, const PyImage& image, const PyImage& grad,
            uintptr_t slope, uintptr_t scale, uintptr_t shift, const PyImage& grad_image) {
            GroupNormBackward call{};
            call.shape = adapter_shape(shape, num_threads), call.C = channels;
            call.image = image_view(image), call.grad = image_view(grad), call.grad_image = image_view(grad_image);
            call.slope = reinterpret_cast<const void*>(slope), call.scale = reinterpret_cast<const void*>(scale);
            call.shift = reinterpret_cast<const void*>(shift);
            TRITONKERN_OLD_KERNEL(group_norm_gradient)(call);
        },
        unlocked);
    m.def(
        "conv3x3",
        [=](const PyAdapterShape& shape, int num_threads, int64_t in_channels, int64_t out_channels, int tile,
            const PySource& source, uintptr_t weight, const std::array<int64_t, 4>& weight_stride, uintptr_t bias,
            bool relu, const std::optional<PyImage>& residual, const std::optional<PyImage>& mask, const PyImage& out) {
            Conv3x3 call{};
            call.shape = adapter_shape(shape, num_threads), call.C = in_channels, call.O = out_channels;
            call.tile = tile, call.source = source_view(source);
            call.weight = reinterpret_cast<const void*>(weight);
            for (int i = 0; i < 4; ++i) call.weight_stride[i] = weight_stride[i];
            call.bias = reinterpret_cast<const void*>(bias), call.relu = relu;
            call.residual = image_view(residual), call.mask = image_view(mask), call.out = image_view(out);
            TRITONKERN_OLD_KERNEL(conv3x3)(call);
        },
        unlocked);
    m.def(
        "conv3x3_weight_gradient",
        [=](const PyAdapterShape& shape, int num_threads, int64_t in_channels, int64_t out_channels, int tile,
            const PySource& source, const PySource& grad_out, uintptr_t grad_weight, uintptr_t grad_bias) {
            TRITONKERN_OLD_KERNEL(conv3x3_weight_gradient)(
                {adapter_shape(shape, num_threads), in_channels, out_channels, tile, source_view(source),
                 source_view(grad_out), reinterpret_cast<void*>(grad_weight), reinterpret_cast<void*>(grad_bias)});
        },
        unlocked);
}

}  // namespace tritonkern
