// The Python module `tritonkern._cpp`: the bindings of all operations, and the choice of the instruction set.
#include <pthread.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <vector>

#include "common/bindings.h"
#include "common/fork.h"

namespace tritonkern {

const Bindings*& Bindings::first() {
    static const Bindings* first = nullptr;
    return first;
}

namespace {

struct Candidate {
    InstructionSet set;
    const char* name;
    bool usable;
};

// Best first.
std::vector<Candidate> usable_instruction_sets() {
    std::vector<Candidate> candidates = {
#ifdef __x86_64__
        {InstructionSet::kAvx512, "avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("f16c")},
        {InstructionSet::kAvx2, "avx2",
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
        {InstructionSet::kBaseline, "baseline", true},
    };
    std::vector<Candidate> usable;
    for (const Candidate& candidate : candidates)
        if (candidate.usable) usable.push_back(candidate);
    return usable;
}

const Candidate& chosen() {
    static const Candidate chosen = [] {
        const char* wanted = std::getenv("TRITONKERN_CPU_ISA");
        std::string names;
        for (const Candidate& candidate : usable_instruction_sets()) {
            if (!wanted || !*wanted || candidate.name == std::string(wanted)) return candidate;
            names += (names.empty() ? "" : ", ") + std::string(candidate.name);
        }
        throw std::runtime_error("TRITONKERN_CPU_ISA is '" + std::string(wanted) +
                                 "', but this machine can use: " + names + ". Unset it to take the best.");
    }();
    return chosen;
}

bool is_amd() {
#ifdef __x86_64__
    return bool(__builtin_cpu_is("amd"));
#else
    return false;
#endif
}

}  // namespace

InstructionSet instruction_set() {
    return chosen().set;
}

}  // namespace tritonkern

PYBIND11_MODULE(_cpp, m) {
    using namespace tritonkern;
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    m.doc() = "CPU kernels of tritonkern. They check dtypes, shapes and devices; tritonkern.ops checks the rest.";
    m.def("isa", [] { return chosen().name; }, "The instruction set that the kernels use: avx512, avx2 or baseline.");
    m.def(
        "isas",
        [] {
            py::list names;
            for (const Candidate& candidate : usable_instruction_sets()) names.append(candidate.name);
            return names;
        },
        "The instruction sets that this machine can use, best first.");
    m.def(
        "view",
        [](const TensorView& x) {
            py::list shape, strides;
            for (int i = 0; i < x.rank; ++i) shape.append(x.shape[i]), strides.append(x.stride[i]);
            return py::make_tuple(name_of(x.dtype), py::tuple(shape), py::tuple(strides));
        },
        py::arg("x"), "Data type, shape and strides of a tensor as the kernels see them.");
    m.def("is_amd", is_amd, "Whether AMD made this processor.");
    for (const Bindings* bindings = Bindings::first(); bindings; bindings = bindings->next) bindings->define(m);
}
