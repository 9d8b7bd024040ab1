// Gradients of query and key, with the weights computed again block by block.
//
//   C[t, s] = share sum_n (A[n, s, t] + B[n, t, s]),  G = gradient of C,  share = 1 / H or 1 / 2H
//
//   d[n, s]      = sum_t A[n, s, t] G[t, s]                    e[n, t]      = sum_s B[n, t, s] G[t, s]
//   a[n, s, t]   = scale share A[n, s, t] (G[t, s] - d[n, s])  b[n, t, s]   = scale share B[n, t, s] (G[t, s] - e[n, t])
//   grad q[a, s] = sum_t a[n, s, t] k[b, t]                    grad q[b, t] = sum_s b[n, t, s] k[a, s]
//   grad k[b, t] = sum_s a[n, s, t] q[a, s]                    grad k[a, s] = sum_t b[n, t, s] q[b, t]
//
// A task owns a head, so that every sum is made by one thread, in one order.
#pragma once

#include "query_key_matching/block.h"
#include "query_key_matching/call.h"

namespace tritonkern::TRITONKERN_ISA::query_key_matching {

template <class A>
class Backward {
    static constexpr int L = kLanes<A>;

    const QueryKeyMatching& call;
    const int64_t chunks, padded;
    const A share;
    Buffer<int64_t> start, order;  // [B, S + 1], [B, M]: the positions in `cells` that name each source cell
    Buffer<A> row_of, column_of;   // [S + kOwn], of each cell; zero beyond

    struct Scratch {
        Block<A> block;
        A *tile, *factor, *gradient, *square, *sum;  // [S, kOwn], [chunks, kOwn], [kChunk, kOwn], [kOwn, kOwn], [kOwn]
        Matrix<A> own, query_source, key_source, query, key;  // [kOwn, padded], [S, padded] four times
        A* lanes[8];                                          // what `from_points` needs of each own source cell

        Scratch(const Backward& f, Arena& arena) : block(f.call.D, arena) {
            const auto matrix = [&](int64_t rows) { return Matrix<A>{arena.take<A>(rows * f.padded), f.padded}; };
            tile = arena.take<A>(f.call.S * kOwn);
            factor = arena.take<A>(f.chunks * kOwn);
            gradient = arena.take<A>(kChunk * kOwn);
            square = arena.take<A>(kOwn * kOwn);
            sum = arena.take<A>(kOwn);
            own = matrix(kOwn);
            query_source = matrix(f.call.S), key_source = matrix(f.call.S);
            query = matrix(f.call.S), key = matrix(f.call.S);
            for (A*& x : lanes) x = arena.take<A>(kOwn);
        }
    };

    Head head(const TensorView& x, int64_t b, int64_t t, int64_t h) const {
        const int64_t* stride = x.stride;
        return {call.dtype, x.data, b * stride[0] + t * stride[1] + h * stride[3], stride[2], call.D};
    }
    int64_t cell(int64_t b, int64_t m) const { return call.cells ? call.cells[b * call.M + m] : m; }
    int64_t row(int64_t b, int64_t t, int64_t m) const { return (b * call.T + t) * call.M + m; }

  public:
    explicit Backward(const QueryKeyMatching& c)
        : call(c),
          chunks(ceil_div(c.S, kChunk)),
          padded(round_up(c.D, kCols<A>)),
          share(A(1) / A(c.H * (c.symmetric ? 2 : 1))),
          start(allocate<int64_t>(c.B * (c.S + 1))),
          order(allocate<int64_t>(c.B * c.M)),
          row_of(allocate<A>(c.S + kOwn)),
          column_of(allocate<A>(c.S + kOwn)) {
        for (int64_t b = 0; b < c.B; ++b) {
            // A counting sort: first[s + 1] counts, then is where cell s ends.
            int64_t *const first = start.get() + b * (c.S + 1), *const sorted = order.get() + b * c.M;
            std::fill_n(first, c.S + 1, int64_t(0));
            for (int64_t m = 0; m < c.M; ++m) ++first[cell(b, m) + 1];
            for (int64_t s = 0; s < c.S; ++s) first[s + 1] += first[s];
            for (int64_t m = 0; m < c.M; ++m) sorted[first[cell(b, m)]++] = m;
            for (int64_t s = c.S; s > 0; --s) first[s] = first[s - 1];
            first[0] = 0;
        }
        for (int64_t s = 0; s < c.S + kOwn; ++s) {
            row_of[s] = s < c.S && c.width ? A(s / c.width) : A(0);
            column_of[s] = s < c.S && c.width ? A(s % c.width) : A(0);
        }
    }

    void run() const {
        Arena count;
        Scratch(*this, count);
        parallel_for(call.B * call.H, 1, call.num_threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Scratch scratch(*this, arena);
            for (int64_t i = first; i < last; ++i) task(i / call.H, i % call.H, scratch);
        });
    }

  private:
    void task(int64_t b, int64_t h, Scratch& s) const {
        clear(s.query_source), clear(s.key_source);
        for (int64_t t = 0; t < call.T; ++t) {
            const bool itself = t == call.source;
            if (itself && !call.grad_cost) continue;  // matched by definition
            const Matrix<A> query = itself ? s.query_source : s.query, key = itself ? s.key_source : s.key;
            if (!itself) clear(query), clear(key);
            for (int64_t m = 0; m < call.M; m += kOwn) over_targets(b, t, h, m, s, key);
            if (call.symmetric)
                for (int64_t i = 0; i < call.S; i += kOwn) over_sources(b, t, h, i, s, query);
            if (!itself) write(b, t, h, query, key);
        }
        write(b, call.source, h, s.query_source, s.key_source);
    }

    void clear(Matrix<A> x) const { std::fill_n(x.data, call.S * padded, A(0)); }

    void write(int64_t b, int64_t t, int64_t h, Matrix<A> query, Matrix<A> key) const {
        for (int64_t s = 0; s < call.S; ++s) {
            const int64_t to = (((b * call.T + t) * call.S + s) * call.H + h) * call.D;
            write_row(call.dtype, query[s], call.grad_query, to, call.D);
            write_row(call.dtype, key[s], call.grad_key, to, call.D);
        }
    }

    void over_targets(int64_t b, int64_t t, int64_t h, int64_t first, Scratch& s, Matrix<A> key) const {
        const int64_t count = min(kOwn, call.M - first);
        const auto number = [&](int64_t i) { return cell(b, first + i); };
        const Head targets = head(call.key, b, t, h);
        s.block.begin(head(call.query, b, call.source, h), call.scale, count, number);
        s.block.weigh(targets, call.S, share, s.tile, s.factor, None{});
        if (!call.grad_cost) describe(b, t, first, count, s);
        differentiate(targets, s, key, [&](int64_t j, int64_t rows) {
            if (call.grad_cost) return from_cost(b, t, first, count, j, rows, s);
            for (int64_t r = 0; r < rows; ++r) {
                const Vec<A> x = broadcast(column_of[j + r]), y = broadcast(row_of[j + r]);
                for (int64_t i = 0; i < kOwn; i += L)
                    store(s.gradient + r * kOwn + i, from_points([&](int k) { return load(s.lanes[k] + i); }, x, y));
            }
        });
        for (int64_t i = 0; i < count; ++i) add_scaled(s.own[i], s.query_source[number(i)]);
    }

    void over_sources(int64_t b, int64_t t, int64_t h, int64_t first, Scratch& s, Matrix<A> query) const {
        const int64_t count = min(kOwn, call.S - first);
        const Head sources = head(call.key, b, call.source, h);
        s.block.begin(head(call.query, b, t, h), call.scale, count, [&](int64_t i) { return first + i; });
        s.block.weigh(sources, call.S, share, s.tile, s.factor, None{});
        const int64_t *const start_of = start.get() + b * (call.S + 1), *const sorted = order.get() + b * call.M;
        differentiate(sources, s, s.key_source, [&](int64_t j, int64_t rows) {
            std::fill_n(s.gradient, rows * kOwn, A(0));
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t k = start_of[j + r]; k < start_of[j + r + 1]; ++k)
                    add_source(b, t, sorted[k], first, count, s.gradient + r * kOwn);
        });
        for (int64_t i = 0; i < count; ++i) add_scaled(s.own[i], query[first + i]);
    }

    void add_scaled(const A* from, A* to) const {
        for (int64_t c = 0; c < padded; c += L) store(to + c, load(to + c) + load(from + c) * A(call.scale));
    }

    // The gradient of C that comes from one source cell, at kOwn targets from `first` on.
    void add_source(int64_t b, int64_t t, int64_t m, int64_t first, int64_t count, A* to) const {
        const int64_t at = row(b, t, m);
        if (call.grad_cost) {
            const A* from = static_cast<const A*>(call.grad_cost) + at * call.S + first;
            for (int64_t i = 0; i < count; ++i) to[i] += from[i];
            return;
        }
        A values[8];
        describe(at, values);
        for (int64_t i = 0; i < kOwn; i += L) {
            const Vec<A> x = load(column_of.get() + first + i), y = load(row_of.get() + first + i);
            store(to + i, load(to + i) + from_points([&](int k) { return broadcast(values[k]); }, x, y));
        }
    }

    // What the gradient of C needs to know of a source cell, see `from_points`.
    void describe(int64_t at, A* values) const {
        const A nan = std::numeric_limits<A>::quiet_NaN();
        const int64_t best = call.index[at];
        const A* const grad = static_cast<const A*>(call.grad_points);
        const A* const point = static_cast<const A*>(call.points) + 2 * at;
        const A weight = static_cast<const A*>(call.weight)[at];
        values[0] = best < 0 ? nan : A(best % call.width), values[1] = best < 0 ? nan : A(best / call.width);
        values[2] = grad ? grad[2 * at] / weight : 0, values[3] = grad ? grad[2 * at + 1] / weight : 0;
        values[4] = point[0] - A(0.5), values[5] = point[1] - A(0.5);
        values[6] = call.grad_peak ? static_cast<const A*>(call.grad_peak)[at] : 0;
        values[7] = best < 0 ? nan : A(0);
    }
    void describe(int64_t b, int64_t t, int64_t first, int64_t count, Scratch& s) const {
        for (int64_t i = 0; i < kOwn; ++i) {
            A values[8] = {};
            if (i < count) describe(row(b, t, first + i), values);
            for (int k = 0; k < 8; ++k) s.lanes[k][i] = values[k];
        }
    }

    // The gradient of C in the cell (x, y) of a source cell whose best cell is (0, 1) of `of`: in the disc around that cell
    // grad_point / weight . (cell - point), and grad_peak in the cell itself; NaN where there is no best cell.
    template <class Of>
    TRITONKERN_INLINE Vec<A> from_points(const Of& of, Vec<A> x, Vec<A> y) const {
        const Vec<A> dx = x - of(0), dy = y - of(1), squared = dx * dx + dy * dy;
        const Vec<A> slope = of(2) * (x - of(4)) + of(3) * (y - of(5));
        return (squared < A(call.limit) ? slope : Vec<A>{}) + (squared == Vec<A>{} ? of(6) : Vec<A>{}) + of(7);
    }

    // The gradient of C for own source cells and targets [j, j + rows), from that of the cost.
    void from_cost(int64_t b, int64_t t, int64_t first, int64_t count, int64_t j, int64_t rows, Scratch& s) const {
        const A* const from = static_cast<const A*>(call.grad_cost) + row(b, t, first) * call.S + j;
        std::fill_n(s.gradient, rows * kOwn, A(0));
        for (int64_t i = 0; i < count; ++i)
            for (int64_t r = 0; r < rows; ++r) s.gradient[r * kOwn + i] = from[i * call.S + r];
    }

    // With the weights of the block in tile and factor, and fill(j, rows) putting the gradient of C for other rows [j, j + rows)
    // into s.gradient: s.own = sum_j a_j other_j and grad_other[j] += a_j own, where a_j = weight_j (G_j - sum_j weight_j G_j).
    template <class Fill>
    void differentiate(const Head& others, Scratch& s, Matrix<A> grad_other, const Fill& fill) const {
        std::fill_n(s.sum, kOwn, A(0));
        for (int64_t j = 0; j < call.S; j += kChunk) {
            const int64_t rows = min(kChunk, call.S - j);
            const A *const tile = s.tile + j * kOwn, *const factor = s.factor + j / kChunk * kOwn;
            fill(j, rows);
            for (int64_t i = 0; i < kOwn; i += L) {
                Vec<A> sum = {};
                for (int64_t r = 0; r < rows; ++r) sum += load(tile + r * kOwn + i) * load(s.gradient + r * kOwn + i);
                store(s.sum + i, load(s.sum + i) + sum * load(factor + i) / share);
            }
        }
        for (int64_t j = 0; j < call.S; j += kChunk) {
            const int64_t rows = min(kChunk, call.S - j);
            const A *const tile = s.tile + j * kOwn, *const factor = s.factor + j / kChunk * kOwn;
            fill(j, rows);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < kOwn; i += L) {
                    A* const g = s.gradient + r * kOwn + i;
                    store(g, load(tile + r * kOwn + i) * load(factor + i) * (load(g) - load(s.sum + i)));
                }
            multiply<A>(rows, padded, kOwn, {s.gradient, kOwn}, {s.block.own.data, padded}, {grad_other[j], padded},
                        true);
            multiply<A, true>(kOwn, padded, rows, {s.gradient, kOwn}, s.block.others(others, j, rows, true), s.own,
                              j > 0);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::query_key_matching
