// What crosses from Python into a kernel. The same for every instruction set, so that it lives outside their
// namespaces.
#pragma once

#include <cstdint>

namespace tritonkern {

enum class DType : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

// A [B, T, N, H, D] tensor. Strides count elements and may have any value, 0 included.
struct TensorView {
    void* data = nullptr;
    int64_t stride[5] = {0, 0, 0, 0, 0};
};

}  // namespace tritonkern
