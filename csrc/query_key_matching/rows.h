// The two operations beside matching: statistics of attention rows, and attention within frames.
#pragma once

#include "query_key_matching/block.h"
#include "query_key_matching/call.h"

namespace tritonkern::TRITONKERN_ISA::query_key_matching {

// P[i, j] = mean_n softmax_j(scale <row_i, key_j>); its maximum and sum in each segment. A task owns kOwn rows.
template <class A>
class Statistics {
    static constexpr int L = kLanes<A>;

    const RowStatistics& call;
    const int64_t chunks;

    struct Scratch {
        Block<A> block;
        A *tile, *factor, *mean;  // [J, kOwn], [chunks, kOwn], [J, kOwn]

        Scratch(const Statistics& f, Arena& arena) : block(f.call.D, arena) {
            tile = arena.take<A>(f.call.J * kOwn);
            factor = arena.take<A>(f.chunks * kOwn);
            mean = arena.take<A>(f.call.J * kOwn);
        }
    };

    Head head(const TensorView& x, int64_t b, int64_t h) const {
        return {call.dtype, x.data, b * x.stride[0] + h * x.stride[2], x.stride[1], call.D};
    }

  public:
    explicit Statistics(const RowStatistics& c) : call(c), chunks(ceil_div(c.J, kChunk)) {}

    void run() const {
        const int64_t blocks = ceil_div(call.N, kOwn);
        Arena count;
        Scratch(*this, count);
        parallel_for(call.B * blocks, 1, call.num_threads, count.used, [&](int64_t first, int64_t last, Arena arena) {
            Scratch scratch(*this, arena);
            for (int64_t i = first; i < last; ++i) task(i / blocks, i % blocks * kOwn, scratch);
        });
    }

  private:
    void task(int64_t b, int64_t first, Scratch& s) const {
        const int64_t count = min(kOwn, call.N - first);
        const bool* const mask = call.mask ? call.mask + b * call.J : nullptr;
        std::fill_n(s.mean, call.J * kOwn, A(0));
        for (int64_t h = 0; h < call.H; ++h) {
            s.block.begin(head(call.rows, b, h), call.scale, count, [&](int64_t i) { return first + i; });
            const auto excluded = [&](int64_t j) { return mask && !mask[j]; };
            s.block.weigh(head(call.key, b, h), call.J, A(1) / A(call.H), s.tile, s.factor, excluded);
            add_weights(s.tile, s.factor, call.J, [](int64_t r) { return r; }, s.mean);
        }
        for (int64_t g = 0; g < call.G; ++g) {
            for (int64_t i = 0; i < count; i += L) {
                // `lost`: what the rounding of `sum` has added too much so far (Kahan); a segment may have many keys.
                Vec<A> highest = {}, sum = {}, lost = {};
                for (int64_t j = call.segments[2 * g]; j < call.segments[2 * g + 1]; ++j) {
                    const Vec<A> p = load(s.mean + j * kOwn + i);
                    highest = p > highest || p != p ? p : highest;
                    const Vec<A> add = p - lost, next = sum + add;
                    lost = (next - sum) - add, sum = next;
                }
                for (int64_t l = 0; l < L && i + l < count; ++l) {
                    const int64_t at = (b * call.N + first + i + l) * call.G + g;
                    static_cast<A*>(call.maximum)[at] = sum[l] != sum[l] ? sum[l] : highest[l];
                    static_cast<A*>(call.sum)[at] = sum[l];
                }
            }
        }
    }
};

// Attention in which text and everything see each other, and video sees its own frame. A task owns kOwn queries of one head, all
// of them text or all of one frame:
//
//   for chunks of keys that are seen:  e = exp(q . k - top),  total += sum e,  out += e v       scaled down as `top` grows
//   for all others, unless renormalised:                      total += sum e
template <class A>
class FrameLocal {
    static constexpr int L = kLanes<A>;

    const FrameLocalAttention& call;
    const int64_t padded, cells, video, text_blocks, frame_blocks, blocks;

    struct Scratch {
        Block<A> block;
        A* strip;       // [kChunk, kOwn]
        Matrix<A> out;  // [kOwn, padded]

        Scratch(const FrameLocal& f, Arena& arena) : block(f.call.D, arena) {
            strip = arena.take<A>(kChunk * kOwn);
            out = {arena.take<A>(kOwn * f.padded), f.padded};
        }
    };

    Head head(const TensorView& x, int64_t b, int64_t h) const {
        return {call.dtype, x.data, b * x.stride[0] + h * x.stride[2], x.stride[1], call.D};
    }

  public:
    explicit FrameLocal(const FrameLocalAttention& c)
        : call(c),
          padded(round_up(c.D, kCols<A>)),
          cells(c.frames ? (c.n - c.text) / c.frames : 0),
          video(c.text_last ? 0 : c.text),
          text_blocks(ceil_div(c.text, kOwn)),
          frame_blocks(ceil_div(cells, kOwn)),
          blocks(text_blocks + c.frames * frame_blocks) {}

    void run() const {
        Arena count;
        Scratch(*this, count);
        parallel_for(call.B * call.H * blocks, 1, call.num_threads, count.used,
                     [&](int64_t first, int64_t last, Arena arena) {
                         Scratch scratch(*this, arena);
                         for (int64_t i = first; i < last; ++i)
                             task(i / blocks / call.H, i / blocks % call.H, i % blocks, scratch);
                     });
    }

  private:
    void task(int64_t b, int64_t h, int64_t block, Scratch& s) const {
        const int64_t text = call.text_last ? call.n - call.text : 0;
        int64_t first, end, begin = 0,
                            stop = call.n;  // queries [first, end), keys of video that they see [begin, stop)
        if (block < text_blocks) {
            first = text + block * kOwn, end = text + call.text;
        } else {
            begin = video + (block - text_blocks) / frame_blocks * cells, stop = begin + cells;
            first = begin + (block - text_blocks) % frame_blocks * kOwn, end = stop;
        }
        const int64_t count = min(kOwn, end - first);
        s.block.begin(head(call.query, b, h), call.scale, count, [&](int64_t i) { return first + i; });
        std::fill_n(s.out.data, kOwn * padded, A(0));
        if (block < text_blocks) {
            visit(b, h, 0, call.n, true, s);
        } else {
            visit(b, h, text, text + call.text, true, s);
            visit(b, h, begin, stop, true, s);
            if (!call.renormalise) {
                visit(b, h, video, begin, false, s);
                visit(b, h, stop, video + call.frames * cells, false, s);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const A inverse = 1 / s.block.total[i];
            for (int64_t c = 0; c < padded; c += L) store(s.out[i] + c, load(s.out[i] + c) * inverse);
            write_row(call.dtype, s.out[i], call.out, ((b * call.n + first + i) * call.H + h) * call.D, call.D);
        }
    }

    void visit(int64_t b, int64_t h, int64_t first, int64_t last, bool seen, Scratch& s) const {
        const Head key = head(call.key, b, h), value = head(call.value, b, h);
        for (int64_t j = first; j < last; j += kChunk) {
            const int64_t rows = min(kChunk, last - j);
            s.block.multiply_own(s.block.others(key, j, rows, false), call.D, rows, s.strip);
            s.block.exponentials(s.strip, rows);
            for (int64_t i = 0; i < kOwn; ++i) {
                const A decay = s.block.decay()[i];
                if (decay == 1) continue;
                for (int64_t c = 0; c < padded; c += L) store(s.out[i] + c, load(s.out[i] + c) * decay);
            }
            if (seen)
                multiply<A, true>(kOwn, padded, rows, {s.strip, kOwn}, s.block.others(value, j, rows, true), s.out,
                                  true);
        }
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::query_key_matching
