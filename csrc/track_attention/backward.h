// Gradients of attention between tracks and a grid. With p recomputed from the scores, and dp_ij = grad_out_i . v_j:
//
//   ds_ij = p_ij * (dp_ij - sum_k p_ik dp_ik)
//   grad_query_i = scale * sum_j ds_ij k_j,   grad_key_j = scale * sum_i ds_ij q_i,   grad_value_j = sum_i p_ij grad_out_i
//
// and through the bias -inverse_variance * |offset_ij|^2, summed over the heads,
//
//   grad_offset_ij = -2 * inverse_variance * ds_ij * offset_ij,   grad_inverse_variance = -sum_ij ds_ij * |offset_ij|^2
//
// where |offset_ij|^2 is taken relative to the nearest column, which changes nothing because the ds of a row sum to zero.
#pragma once

#include "track_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

template <class S>
class Backward {
    using A = Accumulator<S>;

    struct Scratch : HeadScratch<S> {
        A *grad_out, *grad_scores, *grad_key, *grad_value;

        Scratch(int64_t columns, int64_t padded_dim, Arena& arena) : HeadScratch<S>(columns, padded_dim, arena) {
            grad_out = arena.take<A>(kBatchRows * padded_dim);
            grad_scores = arena.take<A>(max(kBatchPairs, round_up(columns, kListMultiple<A>)));
            grad_key = arena.take<A>(columns * padded_dim), grad_value = arena.take<A>(columns * padded_dim);
        }
    };

    const TrackAttention& call;
    const int64_t frames, rows, columns;
    const bool of_points;                      // gradients of positions or of the inverse variance are wanted
    const bool streams_rows, streams_columns;  // results bypass the caches
    // Of each frame and head: the gradients of the tracks' positions [M, 2] and of the inverse variance, which are summed over
    // the heads at the end, in order.
    std::unique_ptr<double[]> grad_tracks, grad_inverse_variance;

  public:
    explicit Backward(const TrackAttention& c)
        : call(c),
          frames(c.B * c.T),
          rows(c.splat ? c.height * c.width : c.M),
          columns(c.splat ? c.M : c.height * c.width),
          of_points(wants_points(c)),
          streams_rows(worth_streaming<S>(c.grad_query, frames * rows * c.H, c.D)),
          streams_columns(worth_streaming<S>(c.grad_key, frames * columns * c.H, c.D) &&
                          worth_streaming<S>(c.grad_value, frames * columns * c.H, c.D)) {
        if (!of_points) return;
        grad_tracks.reset(new double[frames * c.H * c.M * 2]);
        grad_inverse_variance.reset(new double[frames * c.H]);
    }

    void run() const {
        Tasks<S>(call).template run<Scratch>([&](const Frame<S>& frame, const Bounds& bounds, Lists<A>& lists,
                                                 int64_t h,
                                                 const Scratch& scratch) { head(frame, bounds, lists, h, scratch); });
        if (of_points) add_up_points();
    }

  private:
    void head(const Frame<S>& frame, const Bounds& bounds, Lists<A>& lists, int64_t h, const Scratch& scratch) const {
        const int64_t met = frame.geometry.rows(), listed = frame.geometry.columns(), dim = frame.padded_dim;
        if (of_points) {
            std::fill_n(track_gradient(frame, h), call.M * 2, 0.0);
            grad_inverse_variance[frame.index * call.H + h] = 0;
        }
        clear_others(frame, h);
        if (met == 0) return;
        pack(frame, frame.columns_of(call.key), h, scratch.key);
        pack(frame, frame.columns_of(call.value), h, scratch.value);
        std::memset(scratch.grad_key, 0, listed * dim * sizeof(A));
        std::memset(scratch.grad_value, 0, listed * dim * sizeof(A));
        for (int64_t done = 0; done < met; done = lists.last) {
            // Where they fit, the lists of a frame stay for all heads.
            if (!lists.holds(frame.index, done, met)) lists.build(frame, bounds, done, met);
            for (int64_t first = lists.first; first < lists.last;) {
                const int64_t last = batch_end(lists, first);
                batch(frame, lists, first, last, h, scratch);
                first = last;
            }
        }
        const FrameRows<S> grad_key = frame.columns_of(call.grad_key), grad_value = frame.columns_of(call.grad_value);
        for (int64_t j = 0; j < listed; ++j) {
            A* key = scratch.grad_key + j * dim;
            for (int64_t d = 0; d < dim; d += kLanes<A>) store(key + d, load(key + d) * A(call.scale));
            grad_key.write(frame.geometry.column(j), h, key, streams_columns);
            grad_value.write(frame.geometry.column(j), h, scratch.grad_value + j * dim, streams_columns);
        }
    }

    void batch(const Frame<S>& frame, const Lists<A>& lists, int64_t first, int64_t last, int64_t h,
               const Scratch& scratch) const {
        const int64_t origin = lists.start[first], dim = frame.padded_dim;
        const FrameRows<S> queries = frame.rows_of(call.query), grad_outs = frame.rows_of(call.grad_out);
        const FrameRows<S> grad_query = frame.rows_of(call.grad_query);
        weigh(frame, lists, first, last, queries, h, scratch);
        const A* grad_out[kBatchRows];
        for (int64_t i = first; i < last; ++i) {
            grad_outs.prefetch(frame.geometry.row(min(i + kAhead, lists.last - 1)), h);
            grad_out[i - first] = grad_outs.read(frame.geometry.row(i), h, scratch.grad_out + (i - first) * dim);
            softmax_gradient(grad_out[i - first], lists, i, first, dim, scratch);
        }
        for (int64_t i = first; i < last; ++i) {
            const int32_t* column = lists.column + lists.start[i];
            const A* grad_scores = scratch.grad_scores + lists.start[i] - origin;
            gather_list(grad_scores, column, lists.count[i], scratch.key, dim, A(call.scale), scratch.out);
            grad_query.write(frame.geometry.row(i), h, scratch.out, streams_rows);
        }
        for (int64_t i = first; i < last; ++i) {
            const int32_t* column = lists.column + lists.start[i];
            const A* query = queries.read(frame.geometry.row(i), h, scratch.query + (i - first) * dim);
            scatter_list(scratch.grad_scores + lists.start[i] - origin, column, lists.count[i], query, scratch.grad_key,
                         dim);
            scatter_list(scratch.weights + lists.start[i] - origin, column, lists.count[i], grad_out[i - first],
                         scratch.grad_value, dim);
        }
        for (int64_t i = first; i < last && of_points; ++i)
            add_points(frame, lists, i, scratch.grad_scores + lists.start[i] - origin, h);
    }

    // Normalised weights p, and grad_scores = p * (dp - sum of p dp).
    void softmax_gradient(const A* grad_out, const Lists<A>& lists, int64_t i, int64_t first, int64_t dim,
                          const Scratch& scratch) const {
        constexpr int L = kLanes<A>;
        const int64_t at = lists.start[i] - lists.start[first];
        A *weights = scratch.weights + at, *grad_scores = scratch.grad_scores + at;
        const A factor = 1 / scratch.total[i - first];
        Vec<A> dot = {};
        dot_list(grad_out, scratch.value, dim, lists.column + lists.start[i], lists.count[i],
                 [&](int64_t j, Vec<A> products) __attribute__((always_inline)) {
                     const Vec<A> weight = load(weights + j) * factor;
                     store(weights + j, weight), store(grad_scores + j, products);
                     dot += weight * products;
                 });
        const Vec<A> mean = detail::fold<A, L / 2>(dot, Sum{});
        for (int64_t j = 0; j < lists.count[i]; j += L)
            store(grad_scores + j, load(weights + j) * (load(grad_scores + j) - mean));
    }

    void add_points(const Frame<S>& frame, const Lists<A>& lists, int64_t i, const A* grad_scores, int64_t h) const {
        const int32_t* column = lists.column + lists.start[i];
        double* tracks = track_gradient(frame, h);
        const auto nearest = frame.geometry.nearest(i);
        const double slope = 2 * call.inverse_variance;  // of the bias, per cell of offset
        // The gradients of a row's scores sum to zero but for rounding, which the offsets of a track far outside of the grid
        // would magnify: they count from the nearest column.
        double from_x = 0, from_y = 0, sum[2] = {0, 0}, penalty = 0;
        if (!call.splat) frame.geometry.offset(i, nearest.column, from_x, from_y);
        for (int64_t j = 0; j < lists.count[i]; ++j) {
            double dx, dy;
            frame.geometry.offset(i, column[j], dx, dy);
            const double grad = grad_scores[j];
            penalty += grad * (dx * dx + dy * dy - nearest.distance2);
            if (call.splat) {
                double* track = tracks + 2 * frame.geometry.column(column[j]);
                track[0] += slope * grad * dx, track[1] += slope * grad * dy;
            } else {
                sum[0] -= slope * grad * (dx - from_x), sum[1] -= slope * grad * (dy - from_y);
            }
        }
        grad_inverse_variance[frame.index * call.H + h] -= penalty;
        if (!call.splat) {
            double* track = tracks + 2 * frame.geometry.row(i);
            track[0] += sum[0], track[1] += sum[1];
        }
    }

    double* track_gradient(const Frame<S>& frame, int64_t h) const {
        return grad_tracks.get() + (frame.index * call.H + h) * call.M * 2;
    }

    void add_up_points() const {
        A* tracks = static_cast<A*>(call.grad_tracks);
        double total = 0;
        for (int64_t f = 0; f < frames; ++f) {
            const double* of_frame = grad_tracks.get() + f * call.H * call.M * 2;
            for (int64_t i = 0; i < call.M * 2; ++i) {
                double sum = 0;
                for (int64_t h = 0; h < call.H; ++h) sum += of_frame[h * call.M * 2 + i];
                if (tracks) tracks[f * call.M * 2 + i] = A(sum);
            }
            for (int64_t h = 0; h < call.H; ++h) total += grad_inverse_variance[f * call.H + h];
        }
        if (call.grad_inverse_variance) *static_cast<A*>(call.grad_inverse_variance) = A(total);
    }

    // Rows without any column and columns without any row.
    void clear_others(const Frame<S>& frame, int64_t h) const {
        const FrameRows<S> grad_query = frame.rows_of(call.grad_query);
        const FrameRows<S> grad_key = frame.columns_of(call.grad_key), grad_value = frame.columns_of(call.grad_value);
        const bool none = frame.geometry.rows() == 0;
        for (int64_t i = 0; i < rows; ++i)
            if (none || !(call.splat || frame.visible(frame.index, i))) grad_query.clear(i, h);
        for (int64_t j = 0; j < columns; ++j)
            if (none || !(!call.splat || frame.visible(frame.index, j))) grad_key.clear(j, h), grad_value.clear(j, h);
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
