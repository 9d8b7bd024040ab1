// Points and statistics of the correlation.
#pragma once

#include "correlation_soft_argmax/disc.h"
#include "correlation_soft_argmax/product.h"

namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax {

// The tasks: (b, t, chunk of queries, strip of cells). They depend on the shapes alone, so that results do not depend on the
// number of threads.
template <class S>
struct ForwardPlan {
    using A = Accumulator<S>;

    int64_t cells, padded, block, chunk, chunks, groups, strip, strips;
    int threads;

    explicit ForwardPlan(const CorrelationSoftArgmax& call) {
        cells = call.height * call.width, padded = round_up(call.C, kLanes<A>);
        const int64_t row = padded * int64_t(sizeof(A));
        // A second-level cache of 512 KiB holds a chunk of queries and the block of cells that it is multiplied with.
        block =
            max<int64_t>(kCellMultiple, min<int64_t>(kMostCells, (128 << 10) / row / kCellMultiple * kCellMultiple));
        const int64_t longest = max<int64_t>(1, min<int64_t>(512, (256 << 10) / row) / kPanel<A>) * kPanel<A>;
        chunks = max<int64_t>(1, ceil_div(call.N, longest));  // the features are normalised even for no queries
        chunk = round_up(ceil_div(call.N, chunks), kPanel<A>);
        groups = call.B * call.T * chunks;
        // Few groups are cut further, as far as a strip is worth its packing of the queries.
        const int64_t work = cells * padded * round_up(min(call.N, chunk), kLanes<A>);
        strips = max<int64_t>(1, min(ceil_div(int64_t(64), max<int64_t>(1, groups)), work >> 21));
        strip = round_up(ceil_div(cells, strips), block);
        strips = ceil_div(cells, strip);
        threads = int(max<int64_t>(1, min<int64_t>(call.num_threads, (groups * work) >> 17)));
    }
};

template <class S>
class Forward {
    using A = Accumulator<S>;
    using Statistics = PanelStatistics<A>;

    const CorrelationSoftArgmax& call;
    const ForwardPlan<S> plan;
    const Disc disc;

    // With at most this many queries a vector of queries would be nearly empty: the lanes are channels instead.
    static constexpr int64_t kFewQueries = kLanes<A> < 3 ? kLanes<A> : 3;

    struct Scratch {
        A *query_rows, *panels, *rows, *scores;
        Statistics* statistics;

        Scratch(const ForwardPlan<S>& plan, int64_t C, Arena& arena) {
            query_rows = arena.take<A>(kPanel<A> * plan.padded);
            panels = arena.take<A>(plan.chunk * plan.padded);
            rows = arena.take<A>(copied<S>(max<int64_t>(plan.block, Batch<A>::kSize), C));
            scores = arena.take<A>(plan.block * kPanel<A>);
            statistics = arena.take<Statistics>(plan.chunk / kPanel<A> * plan.strips);
        }
    };

    // The queries of one batch entry in one frame.
    struct Group {
        int64_t b, t, begin, end;

        Group(const CorrelationSoftArgmax& call, const ForwardPlan<S>& plan, int64_t index) {
            begin = index % plan.chunks * plan.chunk, index /= plan.chunks;
            end = max(begin, min(begin + plan.chunk, call.N));
            t = index % call.T, b = index / call.T;
        }
    };

  public:
    explicit Forward(const CorrelationSoftArgmax& c) : call(c), plan(c), disc(c.limit, c.height, c.width) {}

    void run() const {
        if (call.cosine) measure_queries();
        const int64_t panels = plan.chunk / kPanel<A>;
        Arena count;
        Scratch(plan, call.C, count);
        // A thread that scans a whole frame finds the cells of the discs still in a cache.
        if (plan.strips == 1 || plan.groups >= 4 * plan.threads) {
            parallel_for(plan.groups, 1, plan.threads, count.used, [&](int64_t index, int64_t, Arena arena) {
                const Group group(call, plan, index);
                const Scratch scratch(plan, call.C, arena);
                pack(group, scratch);
                for (int64_t s = 0; s < plan.strips; ++s) scan(group, s, scratch, scratch.statistics + s * panels);
                for (int64_t n = group.begin; n < group.end; ++n) finish(group, n, scratch.statistics, scratch);
            });
            return;
        }
        std::vector<Statistics> statistics(plan.groups * plan.strips * panels);
        parallel_for(plan.groups * plan.strips, 1, plan.threads, count.used, [&](int64_t i, int64_t, Arena arena) {
            const Group group(call, plan, i / plan.strips);
            const Scratch scratch(plan, call.C, arena);
            pack(group, scratch);
            scan(group, i % plan.strips, scratch, statistics.data() + i * panels);
        });
        parallel_for(plan.groups * panels, 1, plan.threads, count.used, [&](int64_t i, int64_t, Arena arena) {
            const Group group(call, plan, i / panels);
            const Scratch scratch(plan, call.C, arena);
            const int64_t begin = group.begin + i % panels * kPanel<A>;
            for (int64_t n = begin; n < min(begin + kPanel<A>, group.end); ++n)
                finish(group, n, statistics.data() + i / panels * plan.strips * panels, scratch);
        });
    }

  private:
    void measure_queries() const {
        const int64_t queries = call.B * call.N, grain = max<int64_t>(4, 65536 / plan.padded);
        parallel_for(
            queries, grain, plan.threads, copied<S>(4, call.C) * int64_t(sizeof(A)),
            [&](int64_t first, int64_t last, Arena arena) {
                A* scratch = arena.take<A>(copied<S>(4, call.C));
                for (int64_t i = first; i < last; i += 4) {
                    const A* rows[4];
                    A squares[4];
                    for (int k = 0; k < 4; ++k) {
                        const int64_t query = min(i + k, last - 1);
                        rows[k] =
                            Cells<S>::queries(call, query / call.N).row(query % call.N, scratch + k * plan.padded);
                    }
                    sums_of_squares(rows, 4, plan.padded, squares);
                    for (int64_t k = 0; k < min<int64_t>(4, last - i); ++k)
                        static_cast<A*>(call.query_inverse_norm)[i + k] = inverse_norm(squares[k], A(call.eps));
                }
            });
    }

    // The query, with `cosine` normalised, in `scratch`.
    void unit_query(const Cells<S>& queries, int64_t b, int64_t n, A* scratch) const {
        const A* row = queries.row(n, scratch);
        const A factor = call.cosine ? static_cast<const A*>(call.query_inverse_norm)[b * call.N + n] : A(1);
        for (int64_t d = 0; d < plan.padded; d += kLanes<A>) store(scratch + d, load(row + d) * factor);
    }

    // The queries of a group as panels [padded][kPanel]. The last panel stays in `query_rows` as well, row by row.
    void pack(const Group& group, const Scratch& scratch) const {
        const Cells<S> queries = Cells<S>::queries(call, group.b);
        for (int64_t n = group.begin; n < group.end; n += kPanel<A>) {
            const int64_t count = min<int64_t>(kPanel<A>, group.end - n);
            for (int64_t i = 0; i < count; ++i)
                unit_query(queries, group.b, n + i, scratch.query_rows + i * plan.padded);
            transpose_rows(Rows<A>{scratch.query_rows, plan.padded}, count, plan.padded,
                           scratch.panels + (n - group.begin) * plan.padded, round_up(count, kLanes<A>));
        }
    }

    // Statistics of the cells of a strip in the order of their numbers, for all queries of a group. After each block of cells,
    // with c the costs of the cells so far,
    //   maximum = max c,   best = the first cell with c = maximum      (minimum and worst alike)
    //   total   = sum of c
    // A NaN counts as larger than every maximum and as smaller than every minimum, so the first NaN stays.
    void scan(const Group& group, int64_t strip, const Scratch& scratch, Statistics* statistics) const {
        const int64_t begin = strip * plan.strip, end = min(begin + plan.strip, plan.cells);
        const int64_t queries = group.end - group.begin;
        for (int64_t n = 0; n < queries; n += kPanel<A>) statistics[n / kPanel<A>].reset(begin);
        if (queries <= kFewQueries) std::memset(scratch.scores, 0, plan.block * kLanes<A> * sizeof(A));
        const Cells<S> frame = Cells<S>::frame(call, group.b, group.t);
        A* features_inverse_norm =
            static_cast<A*>(call.features_inverse_norm) + (group.b * call.T + group.t) * plan.cells;
        for (int64_t first = begin; first < end; first += plan.block) {
            const int64_t count = min(plan.block, end - first);
            const A* rows[kMostCells];
            A squares[kMostCells], inverse_norms[kMostCells], products[kMostCells];
            const A* factors = call.cosine ? inverse_norms : nullptr;
            for (int64_t i = 0; i < count; ++i) rows[i] = frame.row(first + i, scratch.rows + i * plan.padded);
            for (int64_t i = count; i % kCellMultiple; ++i) rows[i] = rows[count - 1];
            if (call.cosine) {
                sums_of_squares(rows, count, plan.padded, squares);
                for (int64_t i = 0; i < count; ++i) {
                    inverse_norms[i] = inverse_norm(squares[i], A(call.eps));
                    // Every chunk of queries writes the same number, and reads it in `finish`.
                    __atomic_store(features_inverse_norm + first + i, inverse_norms + i, __ATOMIC_RELAXED);
                }
            }
            if (queries <= kFewQueries) {
                for (int64_t n = 0; n < queries; ++n) {
                    row_products(scratch.query_rows + n * plan.padded, rows, count, plan.padded, products);
                    for (int64_t i = 0; i < count; ++i) scratch.scores[i * kLanes<A> + n] = products[i];
                }
                if (queries) detail::panel_statistics<A, 1>(scratch.scores, count, factors, first, *statistics);
                continue;
            }
            // Tiles read many rows at once, each too short for the hardware prefetcher.
            Prefetch<S> ahead(frame, first + count, min(first + count + plan.block, end));
            const int64_t lines = ceil_div(ahead.lines(), ceil_div(queries, int64_t(kPanel<A>)) * 8);
            const auto fetch = [&] { ahead.fetch(lines); };
            for (int64_t n = 0; n < queries; n += kPanel<A>) {
                const auto update = [&](auto vectors) {
                    update_panel<A, vectors>(rows, count, factors, first, scratch.panels + n * plan.padded, plan.padded,
                                             scratch.scores, statistics[n / kPanel<A>], fetch);
                };
                if (queries - n > kLanes<A>) {
                    update(std::integral_constant<int, 2>{});
                } else {
                    update(std::integral_constant<int, 1>{});
                }
            }
        }
    }

    // Merges the strips of query n and computes its point. Strips are merged in the order of their cells, and a later strip
    // replaces the maximum only if it is larger or the first NaN: equal cells keep the first one, as in `scan`.
    //   mean = sum over strips of total / cells,   point: see `locate`
    void finish(const Group& group, int64_t n, const Statistics* statistics, const Scratch& scratch) const {
        const int64_t lane = (n - group.begin) % kPanel<A>, panels = plan.chunk / kPanel<A>;
        statistics += (n - group.begin) / kPanel<A>;
        A maximum = statistics->maximum[lane], minimum = statistics->minimum[lane];
        int64_t best = statistics->best[lane], worst = statistics->worst[lane];
        double total = statistics->total[lane];
        for (int64_t s = 1; s < plan.strips; ++s) {
            const Statistics& next = statistics[s * panels];
            if (!(next.maximum[lane] <= maximum) && maximum == maximum)
                maximum = next.maximum[lane], best = next.best[lane];
            if (!(next.minimum[lane] >= minimum) && minimum == minimum)
                minimum = next.minimum[lane], worst = next.worst[lane];
            total += next.total[lane];
        }

        const int64_t pair = (group.b * call.N + n) * call.T + group.t;
        A *point = static_cast<A*>(call.points) + 2 * pair, *weight = static_cast<A*>(call.weight) + pair;
        if (std::isfinite(maximum)) {
            const Cells<S> frame = Cells<S>::frame(call, group.b, group.t);
            const A* features_inverse_norm =
                static_cast<A*>(call.features_inverse_norm) + (group.b * call.T + group.t) * plan.cells;
            A* query = scratch.query_rows;
            unit_query(Cells<S>::queries(call, group.b), group.b, n, query);
            const auto score = [&](Batch<A>& batch) {
                const A* rows[Batch<A>::kSize];
                for (int i = 0; i < batch.count; ++i)
                    rows[i] = frame.row(batch.cell[i], scratch.rows + i * plan.padded);
                row_products(query, rows, batch.count, plan.padded, batch.score);
                if (call.cosine) {
                    for (int i = 0; i < batch.count; ++i) batch.score[i] *= features_inverse_norm[batch.cell[i]];
                }
            };
            // Computed again with the sums of the disc's scores; `scan` sums in another order.
            Batch<A> only;
            only.add(best, 0, 0);
            score(only);
            maximum = only.score[0];
            minimum = minimum < maximum ? minimum : maximum;
            const auto itself = [](int64_t cell, int64_t, int64_t) { return cell; };
            locate(disc, plan.cells, call.width, best, A(call.temperature), maximum, itself, score, point, weight);
        } else {
            no_point(point, weight);
        }
        static_cast<A*>(call.mean)[pair] = A(total / double(plan.cells));
        static_cast<A*>(call.maximum)[pair] = maximum;
        static_cast<A*>(call.minimum)[pair] = minimum;
        call.best[pair] = int32_t(best), call.worst[pair] = int32_t(worst);
    }
};

}  // namespace tritonkern::TRITONKERN_ISA::correlation_soft_argmax
