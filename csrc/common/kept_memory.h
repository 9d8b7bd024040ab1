// Memory of large results, kept for the next one.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace tritonkern {

// `size` bytes, not initialised. Beyond 32 MiB malloc maps fresh pages for every request, and below it does so whenever the top
// of its heap was given back to the system in between; the page faults of writing them take longer than most computations here:
// 43 ms for 100 MB ("a fresh result, filled" of `make bench`). So a block that is given back waits for a request of about its
// size. Not thread-safe: Python calls it under its lock.
class KeptMemory {
  public:
    explicit KeptMemory(size_t size) : size(size) {
        std::vector<Block>& blocks = idle();
        ++requests();
        Block* best = nullptr;
        for (Block& block : blocks) {
            const bool fits = block.size >= size && block.size - size <= size / 4;
            if (fits && (!best || block.size < best->size)) best = &block;
        }
        if (best) {
            own = *best;
            blocks.erase(blocks.begin() + (best - blocks.data()));
        } else {
            own.size = (size + kGranule - 1) / kGranule * kGranule;
            own.data = map(own.size);
            if (own.data == MAP_FAILED) forget(), own.data = map(own.size);
            if (own.data == MAP_FAILED) {
                own.data = nullptr;
                throw std::bad_alloc();
            }
        }
        release([](const Block& block) { return requests() - block.given_back > kPatience; });
    }

    ~KeptMemory() {
        if (!own.data) return;
        if (own.size > kLimit) {
            munmap(own.data, own.size);
            return;
        }
        own.given_back = requests();
        idle().push_back(own);
        release([](const Block&) { return kept() > kLimit; });
    }

    KeptMemory(const KeptMemory&) = delete;
    KeptMemory& operator=(const KeptMemory&) = delete;

    void* data() const { return own.data; }

    // Bytes that nobody uses.
    static size_t kept() {
        size_t sum = 0;
        for (const Block& block : idle()) sum += block.size;
        return sum;
    }

    // Gives back to the system what nobody uses.
    static void forget() {
        release([](const Block&) { return true; });
    }

    const size_t size;

  private:
    struct Block {
        void* data = nullptr;
        size_t size = 0;
        uint64_t given_back = 0;  // number of requests until then
    };

    static constexpr size_t kGranule = size_t(64) << 10;
    static constexpr size_t kLimit = size_t(512) << 20;
    // A block that so many requests passed over is not waited for again: a model's forward and backward pass make hundreds.
    static constexpr uint64_t kPatience = 1024;

    static void* map(size_t size) {
        return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }

    // Oldest first. Never destroyed: tensors may outlive static objects.
    static std::vector<Block>& idle() {
        static auto& blocks = *new std::vector<Block>;
        return blocks;
    }
    static uint64_t& requests() {
        static uint64_t count = 0;
        return count;
    }

    template <class Unwanted>
    static void release(const Unwanted& unwanted) {
        std::vector<Block>& blocks = idle();
        while (!blocks.empty() && unwanted(blocks.front())) {
            munmap(blocks.front().data, blocks.front().size);
            blocks.erase(blocks.begin());
        }
    }

    Block own;
};

}  // namespace tritonkern
