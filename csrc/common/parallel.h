// A parallel loop over independent tasks on the OpenMP runtime that PyTorch has already loaded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/fork.h"
#include "common/streaming.h"

// Called by name rather than through `#pragma omp`: GCC would emit the same call, but clang would link LLVM's
// runtime, whose second pool of threads would compete with that of PyTorch.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

namespace tritonkern::TRITONKERN_ISA {

constexpr int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
constexpr int64_t ceil_div(int64_t n, int64_t d) {
    return (n + d - 1) / d;
}
template <class T>
constexpr T min(T a, T b) {
    return a < b ? a : b;
}
template <class T>
constexpr T max(T a, T b) {
    return a > b ? a : b;
}

// Memory of a whole call, aligned to a cache line and not initialised.
struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
};
template <class A>
using Buffer = std::unique_ptr<A[], FreeDeleter>;

template <class A>
Buffer<A> allocate(int64_t count) {
    A* p = static_cast<A*>(std::aligned_alloc(kCacheLine, round_up(count * int64_t(sizeof(A)), kCacheLine)));
    if (!p) throw std::bad_alloc();
    return Buffer<A>(p);
}

// Cuts typed buffers out of a thread's scratch memory; without memory it only counts.
struct Arena {
    char* base = nullptr;
    int64_t used = 0;

    template <class A>
    A* take(int64_t count) {
        A* p = base ? reinterpret_cast<A*>(base + used) : nullptr;
        used += round_up(count * int64_t(sizeof(A)), kCacheLine);
        return p;
    }
};

// Calls body(first, last, scratch) for consecutive ranges that cover [0, tasks), each at most `grain` long, on up to
// `num_threads` threads. Ranges are taken in order as threads become free, so that a result must not depend on who runs
// what. `scratch` is an arena of `scratch_bytes` that belongs to the running thread, aligned to a cache line.
template <class Body>
void parallel_for(int64_t tasks, int64_t grain, int num_threads, int64_t scratch_bytes, const Body& body) {
    struct Shared {
        const Body& body;
        int64_t tasks, grain, scratch_bytes;
        char* scratch;
        int64_t next_task, next_thread;
    };
    const int64_t threads = forked ? 1 : max<int64_t>(1, min<int64_t>(num_threads, ceil_div(tasks, grain)));
    scratch_bytes = round_up(scratch_bytes, kCacheLine);
    // One line more for each thread keeps equal buffers of two threads off the same cache sets.
    char* scratch = static_cast<char*>(std::aligned_alloc(kCacheLine, threads * (scratch_bytes + kCacheLine)));
    if (!scratch) throw std::bad_alloc();
    Shared shared{body, tasks, grain, scratch_bytes, scratch, 0, 0};
    auto work = [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        const int64_t thread = __atomic_fetch_add(&s.next_thread, 1, __ATOMIC_RELAXED);
        char* own = s.scratch + thread * (s.scratch_bytes + kCacheLine);
        for (;;) {
            const int64_t first = __atomic_fetch_add(&s.next_task, s.grain, __ATOMIC_RELAXED);
            if (first >= s.tasks) break;
            s.body(first, min(first + s.grain, s.tasks), Arena{own});
        }
        end_of_stream();
    };
    if (threads == 1) {
        work(&shared);
    } else {
        GOMP_parallel(work, &shared, unsigned(threads), 0);
    }
    std::free(scratch);
}

}  // namespace tritonkern::TRITONKERN_ISA
