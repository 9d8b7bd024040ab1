// Memory that a kernel is about to write for the first time.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace tritonkern {

// A large tensor comes from the kernel as untouched 4 KiB pages, and the page faults of writing it may take longer than the
// computation. Asking for 2 MiB pages removes nearly all of them. Only a hint: errors, and memory already in use, do no harm.
inline void expect_writes(void* data, int64_t bytes) {
    constexpr uintptr_t huge_page = uintptr_t(2) << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge_page - 1) & ~(huge_page - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(huge_page - 1);
    if (begin + 4 * huge_page <= end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace tritonkern
