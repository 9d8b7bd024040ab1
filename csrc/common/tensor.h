// What crosses from Python into a kernel. The same for every instruction set, which is why it is outside their namespaces.
#pragma once

#include <cstdint>

namespace tritonkern {

enum class DType : int { kFloat64, kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kBool, kOther };

constexpr int kMaxRank = 6;

// A tensor. Strides count elements and may have any value, 0 included; an axis of size 1 has the stride that it would have if
// the tensor were contiguous from there on, whatever PyTorch calls it. Axes beyond the rank have size 0 and stride 0.
//
// No member functions: they would be compiled for every instruction set under one name (see simd.h).
struct TensorView {
    void* data = nullptr;
    DType dtype = DType::kOther;
    bool on_cpu = false;
    int rank = -1;  // -1: the argument was None
    int64_t shape[kMaxRank] = {};
    int64_t stride[kMaxRank] = {};
};

}  // namespace tritonkern
