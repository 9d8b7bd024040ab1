// What the bindings of all operations share. Included only by csrc/<operation>/bindings.cpp, which are compiled once, for every
// machine.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/kernel.h"
#include "common/tensor.h"

namespace tritonkern {

namespace py = pybind11;

// A function that adds the bindings of one operation to the module; module.cpp calls all of them. Their list is made by static
// constructors, which is safe here and not in a kernel's file: that may hold instructions which this machine lacks.
struct Bindings {
    void (*define)(py::module_&);
    const Bindings* next;

    explicit Bindings(void (*define)(py::module_&)) : define(define), next(first()) { first() = this; }
    static const Bindings*& first();
};

// TRITONKERN_BINDINGS(m) { m.def(...); } at the level of namespaces.
#define TRITONKERN_BINDINGS(m)                         \
    static void define_bindings(::pybind11::module_&); \
    static const Bindings bindings(define_bindings);   \
    static void define_bindings(::pybind11::module_& m)

using Unlocked = py::call_guard<py::gil_scoped_release>;

inline const char* name_of(DType dtype) {
    static const char* const names[] = {"float64", "float32", "bfloat16", "float16", "int32", "int64", "bool", "other"};
    return names[int(dtype)];
}

inline std::string text_of(int rank, const int64_t* shape) {
    std::string text = "[";
    for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// The type of sums and of what is stored with results.
inline DType accumulator(DType dtype) {
    return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// The following throw TypeError or ValueError, naming the argument, unless the tensor is what a kernel counts on.

inline void expect_rank(const char* name, const TensorView& x, int rank) {
    if (x.rank < 0) throw py::type_error(std::string(name) + " must be a tensor, got None");
    if (!x.on_cpu) throw std::invalid_argument(std::string(name) + " must be on the CPU");
    if (x.rank != rank)
        throw std::invalid_argument(std::string(name) + " must have " + std::to_string(rank) + " axes, got shape " +
                                    text_of(x.rank, x.shape));
}

inline void expect_dtype(const char* name, const TensorView& x, DType dtype) {
    if (x.dtype != dtype)
        throw py::type_error(std::string(name) + " must be " + name_of(dtype) + ", got " + name_of(x.dtype));
}

inline void expect_floating(const char* name, const TensorView& x) {
    if (x.dtype > DType::kFloat16)
        throw py::type_error(std::string(name) + " must be float64, float32, bfloat16 or float16, got " +
                             name_of(x.dtype));
}

inline void expect_shape(const char* name, const TensorView& x, int rank, const int64_t* shape) {
    expect_rank(name, x, rank);
    if (std::memcmp(x.shape, shape, rank * sizeof(int64_t)))
        throw std::invalid_argument(std::string(name) + " must have shape " + text_of(rank, shape) + ", got " +
                                    text_of(x.rank, x.shape));
}

inline void expect(const char* name, const TensorView& x, DType dtype, std::initializer_list<int64_t> shape) {
    expect_shape(name, x, int(shape.size()), shape.begin());
    expect_dtype(name, x, dtype);
}

inline void expect_like(const char* name, const TensorView& x, const TensorView& other) {
    expect_shape(name, x, other.rank, other.shape);
    expect_dtype(name, x, other.dtype);
}

inline bool is_empty(const TensorView& x) {
    for (int i = 0; i < x.rank; ++i)
        if (x.shape[i] == 0) return true;
    return false;
}

inline void expect_contiguous(const char* name, const TensorView& x) {
    if (is_empty(x)) return;
    int64_t stride = 1;
    for (int i = x.rank - 1; i >= 0; stride *= x.shape[i--])
        if (x.stride[i] != stride && x.shape[i] > 1)
            throw std::invalid_argument(std::string(name) + " must be contiguous, got strides " +
                                        text_of(x.rank, x.stride));
}

inline void expect_adjacent_channels(const char* name, const TensorView& x) {
    if (!is_empty(x) && x.stride[x.rank - 1] != 1)
        throw std::invalid_argument(std::string(name) +
                                    " must have adjacent numbers along its last axis, got strides " +
                                    text_of(x.rank, x.stride));
}

}  // namespace tritonkern

namespace pybind11::detail {

// Reads a tensor by the methods of torch.Tensor, so that no header of PyTorch is needed and one build serves all its versions.
template <>
struct type_caster<tritonkern::TensorView> {
    PYBIND11_TYPE_CASTER(tritonkern::TensorView, const_name("torch.Tensor"));

    bool load(handle x, bool) {
        using tritonkern::kMaxRank;
        if (x.is_none()) return true;
        const Names& names = Names::get();
        const object data = call(x, names.data_ptr), strides = call(x, names.stride);
        const object shape = get(x, names.shape), dtype = get(x, names.dtype), on_cpu = get(x, names.is_cpu);
        if (!data || !strides || !shape || !dtype || !on_cpu || !PyTuple_Check(strides.ptr()) ||
            !PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) > kMaxRank) {
            PyErr_Clear();
            return false;
        }
        value.data = PyLong_AsVoidPtr(data.ptr());
        value.on_cpu = on_cpu.ptr() == Py_True;
        value.rank = int(PyTuple_GET_SIZE(shape.ptr()));
        int number = 0;
        while (number < int(tritonkern::DType::kOther) && names.dtypes[number] != dtype.ptr()) ++number;
        value.dtype = tritonkern::DType(number);
        for (int i = value.rank - 1; i >= 0; --i) {
            value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
            value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
            // PyTorch leaves the stride of an axis of size 1 to chance; a kernel may multiply it or compare it.
            if (value.shape[i] == 1)
                value.stride[i] = i + 1 == value.rank ? 1 : value.shape[i + 1] * value.stride[i + 1];
        }
        return !PyErr_Occurred();
    }

  private:
    struct Names {
        PyObject *data_ptr, *stride, *shape, *dtype, *is_cpu;
        std::array<PyObject*, size_t(tritonkern::DType::kOther)> dtypes;

        // Lives as long as the process, as do PyTorch's dtypes.
        static const Names& get() {
            static const Names names = [] {
                const auto intern = PyUnicode_InternFromString;
                Names n{intern("data_ptr"), intern("stride"), intern("shape"), intern("dtype"), intern("is_cpu"), {}};
                const module_ torch = module_::import("torch");
                for (size_t i = 0; i < n.dtypes.size(); ++i)
                    n.dtypes[i] = object(torch.attr(tritonkern::name_of(tritonkern::DType(i)))).release().ptr();
                return n;
            }();
            return names;
        }
    };

    static object call(handle x, PyObject* name) {
        return reinterpret_steal<object>(PyObject_CallMethodNoArgs(x.ptr(), name));
    }
    static object get(handle x, PyObject* name) { return reinterpret_steal<object>(PyObject_GetAttr(x.ptr(), name)); }
};

}  // namespace pybind11::detail
