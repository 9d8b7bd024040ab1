// Neighbour search within one frame. Positions (in cells) and distances are float64 for every dtype: they are shared by all
// heads, and differences of squared distances must stay exact for tracks far outside of the grid.
#pragma once

#include <cmath>
#include <limits>

#include "common/strided.h"
#include "track_attention/call.h"

namespace tritonkern::TRITONKERN_ISA::track_attention {

struct Nearest {
    int64_t column;
    double distance2;
};

// Coordinates beyond it count as this many cells, so that no squared distance overflows in any dtype.
constexpr double kFarthest = 0x1p60;

// floor(x) or ceil(x) as an index from `low` to `high`, whatever x is.
inline int64_t clamped(double x, int64_t low, int64_t high) {
    return !(x > double(low)) ? low : x < double(high) ? int64_t(x) : high;
}

// The tracks that take part in one frame, sorted into square bins (tiles of the grid), so that those of neighbouring bins of a
// row of bins are adjacent. Tracks outside of the grid are in the nearest bin at its border.
class Bins {
  public:
    int64_t count = 0;  // tracks that take part
    double *x, *y;      // their positions, in the order of the bins
    int32_t* track;     // and their numbers

    Bins(const TrackAttention& call, Arena& arena) : height(call.height), width(call.width), tracks(call.M) {
        // Two tracks a bin, if they are spread evenly, and bins of at least a cell.
        const double area = double(height) * double(width);
        size = std::sqrt(2 * area / double(max<int64_t>(tracks, 1)));
        size = size > 1 ? size : 1, per_cell = 1 / size;
        columns = clamped(std::ceil(double(width) / size), 1, width);
        rows = clamped(std::ceil(double(height) / size), 1, height);
        x = arena.take<double>(tracks), y = arena.take<double>(tracks);
        track = arena.take<int32_t>(tracks), bin = arena.take<int32_t>(tracks);
        start = arena.take<int32_t>(rows * columns + 1);
    }

    // position: xy of all tracks; visible(m): whether track m takes part.
    template <class A, class Visible>
    void sort(const A* position, const Visible& visible) {
        for (int64_t i = 0; i <= rows * columns; ++i) start[i] = 0;
        count = 0;
        for (int64_t i = 0; i < tracks; ++i) {
            bin[i] = -1;
            if (!visible(i)) continue;
            bin[i] = int32_t(bin_at(position[2 * i + 1], rows) * columns + bin_at(position[2 * i], columns));
            ++start[bin[i] + 1], ++count;
        }
        for (int64_t i = 0; i < rows * columns; ++i) start[i + 1] += start[i];
        for (int64_t i = 0; i < tracks; ++i) {
            if (bin[i] < 0) continue;
            const int32_t at = start[bin[i]]++;
            x[at] = limited(position[2 * i]), y[at] = limited(position[2 * i + 1]), track[at] = int32_t(i);
        }
        for (int64_t i = rows * columns; i > 0; --i) start[i] = start[i - 1];
        start[0] = 0;
    }

    // use(first, last) for ranges that hold at least all tracks within `reach` of a point inside the grid.
    template <class Use>
    TRITONKERN_INLINE void within(double px, double py, double reach, const Use& use) const {
        reach += 1e-6;  // positions are rounded to bins
        const int64_t left = bin_at(px - reach, columns), right = bin_at(px + reach, columns);
        const int64_t top = bin_at(py - reach, rows), bottom = bin_at(py + reach, rows);
        for (int64_t row = top; row <= bottom; ++row)
            use(start[row * columns + left], start[row * columns + right + 1]);
    }

    // The track nearest to a point inside the grid; there must be one. Searches growing squares: the nearest one in a square is
    // the answer if it is no farther than the square reaches; otherwise its distance is the reach of the last search.
    Nearest nearest(double px, double py) const {
        for (double reach = size;; reach *= 2) {
            Nearest best = scan(px, py, reach);
            if (best.column < 0 && reach < double(height + width)) continue;
            if (!(best.distance2 <= reach * reach)) best = scan(px, py, std::sqrt(best.distance2) * (1 + 1e-12));
            return best;
        }
    }

    double distance2(int64_t i, double px, double py) const {
        const double dx = x[i] - px, dy = y[i] - py;
        return dx * dx + dy * dy;
    }

  private:
    static double limited(double x) { return max(-kFarthest, min(kFarthest, x)); }

    int64_t bin_at(double position, int64_t bins) const { return clamped(position * per_cell, 0, bins - 1); }

    Nearest scan(double px, double py, double reach) const {
        Nearest best = {-1, std::numeric_limits<double>::infinity()};
        within(px, py, reach, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const double d = distance2(i, px, py);
                if (d < best.distance2 || best.column < 0) best = {i, d};
            }
        });
        return best;
    }

    const int64_t height, width, tracks;
    int64_t rows, columns;  // of bins
    double size, per_cell;  // of a bin, in cells, and its inverse
    int32_t *bin, *start;
};

// Rows attend to columns: when sampling, rows are the tracks that take part in the order of their bins, and columns the cells;
// when splatting, rows are the cells, and columns those tracks in that order. Every row here has at
// least one column.
template <class A>
class Geometry {
  public:
    Geometry(const TrackAttention& call, Arena& arena)
        : splat(call.splat),
          height(call.height),
          width(call.width),
          inverse_variance(call.inverse_variance),
          bins(call, arena) {}

    template <class Visible>
    void enter(const A* positions, const Visible& visible) {
        bins.sort(positions, visible);
    }

    int64_t cells() const { return height * width; }
    int64_t rows() const { return !splat ? bins.count : bins.count ? cells() : 0; }
    int64_t columns() const { return splat ? bins.count : cells(); }
    // The number of a row or column in its tensor.
    int64_t row(int64_t i) const { return splat ? i : bins.track[i]; }
    int64_t column(int64_t j) const { return splat ? bins.track[j] : j; }

    // Row's position minus column's.
    void offset(int64_t i, int64_t j, double& dx, double& dy) const {
        const int64_t track = splat ? j : i, cell = splat ? i : j;
        const double sign = splat ? -1 : 1;
        dx = sign * (bins.x[track] - center(cell % width)), dy = sign * (bins.y[track] - center(cell / width));
    }

    Nearest nearest(int64_t i) const {
        if (splat) return bins.nearest(center(i % width), center(i / width));
        const int64_t cx = clamped(bins.x[i], 0, width - 1), cy = clamped(bins.y[i], 0, height - 1);
        const double dx = bins.x[i] - center(cx), dy = bins.y[i] - center(cy);
        return {cy * width + cx, dx * dx + dy * dy};
    }

    // Writes the columns whose squared distance to row i is at most radius2 (perhaps some more), and their biases
    // -inverse_variance * (distance^2 - nearest^2); returns how many.
    int64_t neighbours(int64_t i, double radius2, double nearest2, int32_t* column, A* bias) const {
        int64_t count = 0;
        const double radius = std::sqrt(radius2) * (1 + 1e-12);
        if (splat) {
            const double px = center(i % width), py = center(i / width);
            bins.within(px, py, radius, [&](int64_t first, int64_t last) {
                for (int64_t j = first; j < last; ++j) {
                    const double d = bins.distance2(j, px, py);
                    column[count] = int32_t(j), bias[count] = bias_of(d, nearest2);
                    count += !(d > radius2);
                }
            });
            return count;
        }
        const double px = bins.x[i], py = bins.y[i];
        int64_t top, bottom, left, right;
        reach(py, radius, height, top, bottom);
        for (int64_t y = top; y <= bottom; ++y) {
            const double dy = py - center(y), rest = radius2 - dy * dy;
            if (rest < 0) continue;
            reach(px, std::sqrt(rest) * (1 + 1e-12), width, left, right);
            for (int64_t x = left; x <= right; ++x, ++count) {
                const double dx = px - center(x);
                column[count] = int32_t(y * width + x), bias[count] = bias_of(dx * dx + dy * dy, nearest2);
            }
        }
        return count;
    }

    bool splat;

  private:
    static double center(int64_t cell) { return double(cell) + 0.5; }

    // Minus the largest number has the effect of -infinity, without an infinity that a product would turn into NaN.
    A bias_of(double distance2, double nearest2) const {
        constexpr double largest = double(std::numeric_limits<A>::max());
        const double penalty = inverse_variance * (distance2 - nearest2);
        return A(penalty > largest ? -largest : -penalty);
    }

    // Cells first..last whose centres are within `radius` of `position`: wider than that where the position is so far away
    // that its distances to cells are not exact.
    static void reach(double position, double radius, int64_t cells, int64_t& first, int64_t& last) {
        first = 0, last = cells - 1;
        if (!(radius < std::numeric_limits<double>::infinity())) return;
        radius += 1e-12 * (1 + std::abs(position));
        first = clamped(std::ceil(position - 0.5 - radius), 0, cells);
        last = clamped(std::floor(position - 0.5 + radius), -1, cells - 1);
    }

    const int64_t height, width;
    const double inverse_variance;
    Bins bins;
};

}  // namespace tritonkern::TRITONKERN_ISA::track_attention
