// Kernels exist once for each instruction set, under the same name in different namespaces; the binding of an operation takes
// the version for this machine.
#pragma once

namespace tritonkern {

// Declares `void kernel(const Call&)` of an operation for every instruction set.
#define TRITONKERN_DECLARE_KERNEL(operation, kernel, Call) \
    namespace baseline::operation {                        \
    void kernel(const Call& call);                         \
    }                                                      \
    namespace avx2::operation {                            \
    void kernel(const Call& call);                         \
    }                                                      \
    namespace avx512::operation {                          \
    void kernel(const Call& call);                         \
    }

// The version for this machine. For bindings alone, which are compiled once.
#ifdef __x86_64__
#define TRITONKERN_KERNEL(operation, kernel) \
    choose_kernel(baseline::operation::kernel, avx2::operation::kernel, avx512::operation::kernel)
#else
#define TRITONKERN_KERNEL(operation, kernel) baseline::operation::kernel
#endif

enum class InstructionSet : int { kBaseline, kAvx2, kAvx512 };

// The best set that this machine has, or the one that the environment variable TRITONKERN_CPU_ISA names. Chosen at the first
// call; throws if that name is not usable.
InstructionSet instruction_set();

template <class Kernel>
Kernel* choose_kernel(Kernel* baseline, Kernel* avx2, Kernel* avx512) {
    Kernel* const versions[] = {baseline, avx2, avx512};
    return versions[int(instruction_set())];
}

}  // namespace tritonkern
