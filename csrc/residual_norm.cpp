// The glue of a pre-norm transformer block in one pass over memory:
//
//   sum = x + gamma * branch,   normed = (sum - mean) / sqrt(variance + eps) * weight + bias   for every row of C
//
// A row comes into the first-level cache once, as numbers of the accumulator's type; all that follows happens there.
#include <algorithm>
#include <cmath>

#include "common/parallel.h"
#include "common/rows.h"
#include "residual_norm/call.h"

namespace tritonkern::TRITONKERN_ISA {
namespace {

template <class A>
class Glue {
    static constexpr int L = kLanes<A>;

    const ResidualNorm& call;
    const int64_t C, padded;

    // Buffers of one thread, each one row, zero from C to whole vectors.
    struct Scratch {
        A *row, *other, *more, *gamma, *weight, *bias, *partial;

        Scratch(const Glue& glue, Arena& arena) {
            A** const buffers[] = {&row, &other, &more, &gamma, &weight, &bias};
            for (A** buffer : buffers) {
                *buffer = arena.take<A>(glue.padded);
                if (*buffer) std::fill(*buffer, *buffer + glue.padded, A(0));
            }
            partial = arena.take<A>(3 * glue.padded);
            if (!row) return;
            glue.parameter(glue.call.gamma, A(1), gamma);
            glue.parameter(glue.call.weight, A(1), weight);
            glue.parameter(glue.call.bias, A(0), bias);
        }
    };

    void parameter(const void* from, A otherwise, A* to) const {
        if (from) {
            std::copy_n(static_cast<const A*>(from), C, to);
        } else {
            std::fill(to, to + C, otherwise);
        }
    }

    template <class Run>
    TRITONKERN_INLINE void each(const Run& run) const {
        for (int64_t c = 0; c < padded; c += L) run(c);
    }

    // A row from memory; its tail is zero again, whatever a NaN has made of it.
    void fetch(DType dtype, const void* base, int64_t r, A* row) const {
        read_row(dtype, base, r * C, C, row);
        std::fill(row + C, row + padded, A(0));
    }

    template <class Value>
    TRITONKERN_INLINE A total(const Value& value) const {
        return row_sum<A>(padded, value);
    }

    // Takes the mean off the row; returns the factor that gives it unit variance.
    A centre(A* row) const {
        const A mean = total([&](int64_t c) { return load(row + c); }) / A(C);
        each([&](int64_t c) { store(row + c, load(row + c) - mean); });
        for (int64_t c = C; c < padded; ++c) row[c] = 0;
        const A variance = total([&](int64_t c) { return load(row + c) * load(row + c); }) / A(C);
        return 1 / std::sqrt(variance + A(call.eps));
    }

  public:
    explicit Glue(const ResidualNorm& c) : call(c), C(c.C), padded(round_up(c.C, L)) {}

    void forward() const {
        Arena count;
        Scratch(*this, count);
        parallel_for(call.rows, max<int64_t>(1, 32768 / C), call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         const Scratch scratch(*this, arena);
                         for (int64_t r = first; r < last; ++r) forward(r, scratch);
                     });
    }

    void backward() const {
        Arena count;
        Scratch(*this, count);
        parallel_for(ceil_div(call.rows, call.chunk), 1, call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         const Scratch scratch(*this, arena);
                         for (int64_t chunk = first; chunk < last; ++chunk) {
                             std::fill(scratch.partial, scratch.partial + 3 * padded, A(0));
                             const int64_t end = min(call.rows, (chunk + 1) * call.chunk);
                             for (int64_t r = chunk * call.chunk; r < end; ++r) backward(r, scratch);
                             if (!call.partial) continue;
                             A* out = static_cast<A*>(call.partial) + chunk * 3 * C;
                             for (int i = 0; i < 3; ++i) std::copy_n(scratch.partial + i * padded, C, out + i * C);
                         }
                     });
    }

  private:
    void forward(int64_t r, const Scratch& s) const {
        A* const row = s.row;
        fetch(call.dtype, call.x, r, row);
        if (call.branch) {
            fetch(call.branch_dtype, call.branch, r, s.other);
            each([&](int64_t c) { store(row + c, load(row + c) + load(s.gamma + c) * load(s.other + c)); });
            write_row(call.dtype, row, call.sum, r * C, C);
            // What is normalised is what the next block sees.
            if (call.dtype == DType::kBFloat16 || call.dtype == DType::kFloat16) fetch(call.dtype, call.sum, r, row);
        }
        const A scale = centre(row);
        each([&](int64_t c) { store(row + c, load(row + c) * scale * load(s.weight + c) + load(s.bias + c)); });
        write_row(call.out_dtype, row, call.normed, r * C, C);
    }

    //   grad = grad_sum + scale * (g - mean(g) - n * mean(g * n)),   g = grad_normed * weight,   n = the normalised row
    void backward(int64_t r, const Scratch& s) const {
        A *const row = s.row, *const grad = s.other, *const arriving = s.more;
        if (call.grad_sum) {
            fetch(call.dtype, call.grad_sum, r, grad);
        } else {
            std::fill(grad, grad + padded, A(0));
        }
        if (call.grad_normed) {
            fetch(call.dtype, call.x, r, row);
            const A scale = centre(row);
            each([&](int64_t c) { store(row + c, load(row + c) * scale); });
            fetch(call.out_dtype, call.grad_normed, r, arriving);
            if (call.partial) {
                each([&](int64_t c) {
                    A *const weight = s.partial + padded + c, *const bias = s.partial + 2 * padded + c;
                    store(weight, load(weight) + load(arriving + c) * load(row + c));
                    store(bias, load(bias) + load(arriving + c));
                });
            }
            each([&](int64_t c) { store(arriving + c, load(arriving + c) * load(s.weight + c)); });
            const A mean = total([&](int64_t c) { return load(arriving + c); }) / A(C);
            const A slope = total([&](int64_t c) { return load(arriving + c) * load(row + c); }) / A(C);
            each([&](int64_t c) {
                store(grad + c, load(grad + c) + scale * (load(arriving + c) - mean - load(row + c) * slope));
            });
        }
        if (call.grad_x) write_row(call.dtype, grad, call.grad_x, r * C, C);
        if (call.partial && call.branch) {
            fetch(call.branch_dtype, call.branch, r, row);
            each([&](int64_t c) { store(s.partial + c, load(s.partial + c) + load(grad + c) * load(row + c)); });
        }
        if (call.grad_branch) {
            each([&](int64_t c) { store(grad + c, load(grad + c) * load(s.gamma + c)); });
            write_row(call.branch_dtype, grad, call.grad_branch, r * C, C);
        }
    }
};

}  // namespace

void residual_norm_forward(const ResidualNorm& call) {
    if (call.dtype == DType::kFloat64) return Glue<double>(call).forward();
    Glue<float>(call).forward();
}

void residual_norm_backward(const ResidualNorm& call) {
    if (call.dtype == DType::kFloat64) return Glue<double>(call).backward();
    Glue<float>(call).backward();
}

}  // namespace tritonkern::TRITONKERN_ISA
