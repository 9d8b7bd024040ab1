// Output and log-sum-exp of attention between tracks and a grid.
#pragma once

#include "track_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA {

template <class S>
class TrackForward {
    using A = Accumulator<S>;

    const TrackAttention& call;
    const int64_t rows;
    const bool streams;  // the output bypasses the caches

  public:
    explicit TrackForward(const TrackAttention& c)
        : call(c),
          rows(c.splat ? c.height * c.width : c.M),
          streams(worth_streaming<S>(c.out, c.B * c.T * rows * c.H, c.D)) {}

    void run() const {
        Tasks<S>(call).template run<HeadScratch<S>>(
            [&](const Frame<S>& frame, const Bounds& bounds, Lists<A>& lists, int64_t h,
                const HeadScratch<S>& scratch) { head(frame, bounds, lists, h, scratch); });
    }

  private:
    void head(const Frame<S>& frame, const Bounds& bounds, Lists<A>& lists, int64_t h,
              const HeadScratch<S>& scratch) const {
        const int64_t met = frame.geometry.rows();
        const FrameRows<S> queries = frame.rows_of(call.query), out = frame.rows_of(call.out);
        A* lse = static_cast<A*>(call.lse) + frame.index * rows * call.H + h;
        clear_others(frame, out, lse, h);
        if (met == 0) return;
        pack(frame, frame.columns_of(call.key), h, scratch.key);
        pack(frame, frame.columns_of(call.value), h, scratch.value);
        for (int64_t done = 0; done < met; done = lists.last) {
            // Where they fit, the lists of a frame stay for all heads.
            if (!lists.holds(frame.index, done, met)) lists.build(frame, bounds, done, met);
            for (int64_t first = lists.first; first < lists.last;) {
                const int64_t last = batch_end(lists, first);
                batch(frame, lists, first, last, queries, out, lse, h, scratch);
                first = last;
            }
        }
    }

    void batch(const Frame<S>& frame, const Lists<A>& lists, int64_t first, int64_t last, const FrameRows<S>& queries,
               const FrameRows<S>& out, A* lse, int64_t h, const HeadScratch<S>& scratch) const {
        weigh(frame, lists, first, last, queries, h, scratch);
        for (int64_t i = first; i < last; ++i) {
            const A* weights = scratch.weights + lists.start[i] - lists.start[first];
            gather_list(weights, lists.column + lists.start[i], lists.count[i], scratch.value, frame.padded_dim,
                        1 / scratch.total[i - first], scratch.out);
            out.write(frame.geometry.row(i), h, scratch.out, streams);
        }
        for (int64_t i = 0; i < last - first; i += kLanes<A>)
            store(scratch.maximum + i, load(scratch.maximum + i) + log<A>(load(scratch.total + i)));
        for (int64_t i = first; i < last; ++i) lse[frame.geometry.row(i) * call.H] = scratch.maximum[i - first];
    }

    // Rows that meet no column.
    void clear_others(const Frame<S>& frame, const FrameRows<S>& out, A* lse, int64_t h) const {
        const bool* visible = frame.visible(frame.index);
        for (int64_t i = 0; i < rows; ++i) {
            if (call.splat ? frame.geometry.rows() > 0 : visible[i]) continue;
            out.clear(i, h);
            lse[i * call.H] = -std::numeric_limits<A>::infinity();
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA
