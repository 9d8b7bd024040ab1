// One frame: which columns each row visits. The bound is derived in tritonkern/ops/track_attention/README.md.
#pragma once

#include <memory>

#include "track_attention/geometry.h"
#include "track_attention/products.h"
#include "track_attention/rows.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

// The distance from one to the next larger number of a dtype.
template <class S>
constexpr double kEpsilon = std::is_same_v<S, double>     ? 0x1p-52
                            : std::is_same_v<S, float>    ? 0x1p-23
                            : std::is_same_v<S, BFloat16> ? 0x1p-7
                                                          : 0x1p-10;

template <class A>
inline A dot(const A* x, const A* y, int64_t dim) {
    Vec<A> sum = {};
    for (int64_t d = 0; d < dim; d += kLanes<A>) sum += load(x + d) * load(y + d);
    return detail::fold<A, kLanes<A> / 2>(sum, Sum{})[0];
}

// Whether gradients of positions or of the inverse variance are wanted.
inline bool wants_points(const TrackAttention& call) {
    return call.grad_tracks || call.grad_inverse_variance;
}

// How far the rows of all frames look. Rows are numbered as in `Geometry`.
struct Reach {
    double radius2, nearest2;  // squared distances in cells: of the farthest column to visit, of the nearest one
};
struct Bounds {
    int64_t rows, heads;
    std::unique_ptr<Reach[]> reach;      // [frames, rows]
    std::unique_ptr<double[]> key_norm;  // [frames, heads], the largest of those that may be attended to

    Bounds(int64_t frames, int64_t rows, int64_t heads)
        : rows(rows), heads(heads), reach(new Reach[frames * rows]), key_norm(new double[frames * heads]) {}
};

template <class S>
class Frame {
    using A = Accumulator<S>;

  public:
    const TrackAttention& call;
    const int64_t padded_dim;
    Geometry<A> geometry;
    int64_t index, b, t;

    Frame(const TrackAttention& c, Arena& arena) : call(c), padded_dim(round_up(c.D, kLanes<A>)), geometry(c, arena) {
        buffer[0] = arena.take<A>(padded_dim), buffer[1] = arena.take<A>(padded_dim);
    }

    void enter(int64_t frame) {
        index = frame, b = frame / call.T, t = frame % call.T;
        geometry.enter(positions(frame), [&](int64_t m) { return visible(frame, m); });
    }

    // Whether track m takes part in a frame: visible, at a finite position.
    bool visible(int64_t frame, int64_t m) const {
        const A* xy = positions(frame) + 2 * m;
        return (!call.visible || call.visible[frame * call.M + m]) && std::isfinite(xy[0]) && std::isfinite(xy[1]);
    }

    int64_t row_width() const { return call.splat ? call.width : call.M; }
    int64_t column_width() const { return call.splat ? call.M : call.width; }
    FrameRows<S> rows_of(const TensorView& view) const { return {view, b, t, row_width(), call.D}; }
    FrameRows<S> columns_of(const TensorView& view) const { return {view, b, t, column_width(), call.D}; }

    // The largest norms of keys, at least; infinite where one is not finite.
    void find_key_norms(int64_t frame, int64_t first_head, int64_t last_head, Bounds& bounds) const {
        const FrameRows<S> keys(call.key, frame / call.T, frame % call.T, column_width(), call.D);
        double* norm = bounds.key_norm.get() + frame * call.H;
        for (int64_t h = first_head; h < last_head; ++h) norm[h] = 0;
        for (int64_t j = 0; j < (call.splat ? call.M : geometry.cells()); ++j) {
            if (call.splat && !visible(frame, j)) continue;
            for (int64_t h = first_head; h < last_head; ++h) {
                const A* key = keys.read(j, h, buffer[0]);
                const double squared = dot(key, key, padded_dim);
                norm[h] = squared <= norm[h] ? norm[h] : squared == squared ? squared : kInfinity;
            }
        }
        for (int64_t h = first_head; h < last_head; ++h) norm[h] = norm_from(norm[h]);
    }

    // How far rows first..last-1 of the entered frame look.
    void find_reaches(int64_t first, int64_t last, Bounds& bounds) const {
        const FrameRows<S> queries = rows_of(call.query), keys = columns_of(call.key);
        const double* key_norm = bounds.key_norm.get() + index * call.H;
        // Weights of at most epsilon / (8 columns) of the nearest column's; see the README.
        const double negligible = std::log(8 * double(geometry.columns()) / epsilon());
        for (int64_t i = first; i < last; ++i) {
            const Nearest nearest = geometry.nearest(i);
            double excess = 0;  // of another column's product over that of the nearest one, in any head
            for (int64_t h = 0; h < call.H && call.culling; ++h) {
                const A* query = queries.read(geometry.row(i), h, buffer[0]);
                const A* key = keys.read(geometry.column(nearest.column), h, buffer[1]);
                const double norms = norm_from(dot(query, query, padded_dim)) * key_norm[h];
                const double product = dot(query, key, padded_dim);
                const double most = std::abs(call.scale) * norms * (1 + 2 * rounding()) - call.scale * product;
                excess = most <= excess ? excess : most == most ? most : kInfinity;
            }
            const double further =
                (excess + negligible) / call.inverse_variance;  // squared cells beyond the nearest column
            const bool bounded = call.culling && call.inverse_variance > 0 && further < kInfinity;
            bounds.reach[index * bounds.rows + i] = {bounded ? (nearest.distance2 + further) * (1 + 1e-12) : kInfinity,
                                                     nearest.distance2};
        }
    }

  private:
    static constexpr double kInfinity = std::numeric_limits<double>::infinity();

    const A* positions(int64_t frame) const { return static_cast<const A*>(call.tracks) + frame * call.M * 2; }

    // Of the results; the gradients of positions are in the type of the accumulator.
    double epsilon() const { return wants_points(call) ? kEpsilon<A> : kEpsilon<S>; }

    // Relative error of a computed product of two rows, at most, over the product of their norms.
    double rounding() const { return double(call.D) * double(std::numeric_limits<A>::epsilon()); }

    // At least the norm whose square was computed as `squared`; small squares are rounded to zero.
    double norm_from(double squared) const {
        const double lost = double(call.D) * double(std::numeric_limits<A>::min());
        const double norm = std::sqrt(squared * (1 + 2 * rounding()) + lost);
        return norm == norm ? norm : kInfinity;
    }

    A* buffer[2];
};

// The columns that rows first..last-1 visit, in the order of the rows. Each list is padded to whole vectors with columns of
// its own, which have a bias of -infinity and so a weight of zero.
template <class A>
struct Lists {
    // Pairs of a block of rows: a megabyte in float32.
    static constexpr int64_t kPairs = 1 << 17;

    int64_t capacity, frame = -1, first = 0, last = 0;
    int32_t* column;
    A* bias;
    int64_t *start, *count;  // of each row, in `column` and `bias`

    Lists(int64_t rows, int64_t columns, Arena& arena) {
        const int64_t longest = round_up(columns + 1, kListMultiple<A>);
        capacity = min(kPairs, rows * longest) + longest;
        column = arena.take<int32_t>(capacity), bias = arena.take<A>(capacity);
        start = arena.take<int64_t>(rows + 1), count = arena.take<int64_t>(rows);
    }

    // Whether the lists are those of rows from..rows-1 of this frame.
    bool holds(int64_t index, int64_t from, int64_t rows) const {
        return frame == index && first == from && last == rows;
    }

    // Takes rows from `from` on, until `rows` or until they have too many pairs.
    template <class S>
    void build(const Frame<S>& of, const Bounds& bounds, int64_t from, int64_t rows) {
        const int64_t longest = round_up(of.geometry.columns() + 1, kListMultiple<A>);
        const Reach* reach = bounds.reach.get() + of.index * bounds.rows;
        frame = of.index, first = last = from;
        int64_t used = 0;
        for (; last < rows && used + longest <= capacity; ++last) {
            int32_t* columns = column + used;
            A* biases = bias + used;
            const int64_t n = of.geometry.neighbours(last, reach[last].radius2, reach[last].nearest2, columns, biases);
            const int64_t padded = round_up(n, kListMultiple<A>);
            for (int64_t j = n; j < padded; ++j)
                columns[j] = columns[0], biases[j] = -std::numeric_limits<A>::infinity();
            start[last] = used, count[last] = n, used += padded;
        }
        start[last] = used;
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
