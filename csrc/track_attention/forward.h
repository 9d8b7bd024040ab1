// Output of track attention: out_i = sum_j p_ij v_j, p_i = softmax_j of scale * q_i . k_j - inverse_variance * distance_ij^2.
#pragma once

#include "track_attention/tasks.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

template <class S>
class Forward {
    using A = Accumulator<S>;

    const TrackAttention& call;
    const int64_t rows;
    const bool streams;  // the output bypasses the caches

  public:
    explicit Forward(const TrackAttention& c)
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
        // Rows without any column.
        for (int64_t i = 0; i < rows; ++i)
            if (!(call.splat ? met > 0 : frame.visible(frame.index, i))) out.clear(i, h);
        if (met == 0) return;
        pack(frame, frame.columns_of(call.key), h, scratch.key);
        pack(frame, frame.columns_of(call.value), h, scratch.value);
        for (int64_t done = 0; done < met; done = lists.last) {
            // Where they fit, the lists of a frame stay for all heads.
            if (!lists.holds(frame.index, done, met)) lists.build(frame, bounds, done, met);
            for (int64_t first = lists.first; first < lists.last;) {
                const int64_t last = batch_end(lists, first);
                batch(frame, lists, first, last, queries, out, h, scratch);
                first = last;
            }
        }
    }

    void batch(const Frame<S>& frame, const Lists<A>& lists, int64_t first, int64_t last, const FrameRows<S>& queries,
               const FrameRows<S>& out, int64_t h, const HeadScratch<S>& scratch) const {
        weigh(frame, lists, first, last, queries, h, scratch);
        for (int64_t i = first; i < last; ++i) {
            const A* weights = scratch.weights + lists.start[i] - lists.start[first];
            gather_list(weights, lists.column + lists.start[i], lists.count[i], scratch.value, frame.padded_dim,
                        1 / scratch.total[i - first], scratch.out);
            out.write(frame.geometry.row(i), h, scratch.out, streams);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
