// Bindings of query-key matching and the two operations beside it.
#include "common/bindings.h"

#include "query_key_matching/call.h"

namespace tritonkern {
namespace {

template <class Data = void>
Data* dense(const char* name, const TensorView& x, DType dtype, std::initializer_list<int64_t> shape) {
    expect(name, x, dtype, shape);
    expect_contiguous(name, x);
    return static_cast<Data*>(x.data);
}

void expect_rows(const char* name, const TensorView& x, const TensorView& like) {
    expect_like(name, x, like);
    expect_adjacent_channels(name, x);
}

QueryKeyMatching describe(const TensorView& query, const TensorView& key, const TensorView& cells, int64_t source,
                          double scale, bool symmetric, int num_threads) {
    expect_rank("query", query, 5);
    expect_floating("query", query);
    expect_rows("query", query, query);
    expect_rows("key", key, query);
    QueryKeyMatching call{};
    call.dtype = query.dtype;
    call.B = query.shape[0], call.T = query.shape[1], call.S = query.shape[2], call.H = query.shape[3];
    call.D = query.shape[4], call.M = cells.rank < 0 ? call.S : cells.shape[1];
    if (cells.rank >= 0) call.cells = dense<int64_t>("cells", cells, DType::kInt64, {call.B, call.M});
    if (source < 0 || source >= call.T) throw std::invalid_argument("source must be a frame");
    for (int64_t i = 0; call.cells && i < call.B * call.M; ++i)
        if (call.cells[i] < 0 || call.cells[i] >= call.S)
            throw std::invalid_argument("cells must be from 0 to " + std::to_string(call.S - 1) + ", got " +
                                        std::to_string(call.cells[i]));
    call.source = source, call.scale = scale, call.symmetric = symmetric, call.num_threads = num_threads;
    call.query = query, call.key = key;
    return call;
}

void set_grid(QueryKeyMatching& call, int64_t height, int64_t width, double limit) {
    if (height < 1 || width < 1 || height * width != call.S) throw std::invalid_argument("the grid must have S cells");
    call.height = height, call.width = width, call.limit = limit;
}

void forward(const TensorView& query, const TensorView& key, const TensorView& cells, int64_t source, int64_t height,
             int64_t width, double scale, bool symmetric, double limit, int num_threads, const TensorView& peak,
             const TensorView& points, const TensorView& index, const TensorView& weight) {
    auto call = describe(query, key, cells, source, scale, symmetric, num_threads);
    set_grid(call, height, width, limit);
    const DType real = accumulator(call.dtype);
    call.index = dense<int64_t>("index", index, DType::kInt64, {call.B, call.T, call.M});
    call.peak = dense("peak", peak, real, {call.B, call.T, call.M});
    call.points = dense("points", points, real, {call.B, call.T, call.M, 2});
    call.weight = dense("weight", weight, real, {call.B, call.T, call.M});
    TRITONKERN_KERNEL(query_key_matching, forward)(call);
}

void backward(const TensorView& grad_peak, const TensorView& grad_points, const TensorView& query,
              const TensorView& key, const TensorView& cells, const TensorView& index, const TensorView& points,
              const TensorView& weight, int64_t source, int64_t height, int64_t width, double scale, bool symmetric,
              double limit, int num_threads, const TensorView& grad_query, const TensorView& grad_key) {
    auto call = describe(query, key, cells, source, scale, symmetric, num_threads);
    set_grid(call, height, width, limit);
    const DType real = accumulator(call.dtype);
    const int64_t B = call.B, T = call.T, M = call.M;
    if (grad_peak.rank >= 0) call.grad_peak = dense("grad_peak", grad_peak, real, {B, T, M});
    if (grad_points.rank >= 0) call.grad_points = dense("grad_points", grad_points, real, {B, T, M, 2});
    call.index = dense<int64_t>("index", index, DType::kInt64, {B, T, M});
    call.points = dense("points", points, real, {B, T, M, 2});
    call.weight = dense("weight", weight, real, {B, T, M});
    call.grad_query = dense("grad_query", grad_query, call.dtype, {B, T, call.S, call.H, call.D});
    call.grad_key = dense("grad_key", grad_key, call.dtype, {B, T, call.S, call.H, call.D});
    TRITONKERN_KERNEL(query_key_matching, backward)(call);
}

void cost_forward(const TensorView& query, const TensorView& key, const TensorView& cells, int64_t source, double scale,
                  bool symmetric, int num_threads, const TensorView& cost) {
    auto call = describe(query, key, cells, source, scale, symmetric, num_threads);
    call.cost = dense("cost", cost, accumulator(call.dtype), {call.B, call.T, call.M, call.S});
    TRITONKERN_KERNEL(query_key_matching, forward)(call);
}

void cost_backward(const TensorView& grad_cost, const TensorView& query, const TensorView& key, const TensorView& cells,
                   int64_t source, double scale, bool symmetric, int num_threads, const TensorView& grad_query,
                   const TensorView& grad_key) {
    auto call = describe(query, key, cells, source, scale, symmetric, num_threads);
    call.grad_cost = dense("grad_cost", grad_cost, accumulator(call.dtype), {call.B, call.T, call.M, call.S});
    call.grad_query = dense("grad_query", grad_query, call.dtype, {call.B, call.T, call.S, call.H, call.D});
    call.grad_key = dense("grad_key", grad_key, call.dtype, {call.B, call.T, call.S, call.H, call.D});
    TRITONKERN_KERNEL(query_key_matching, backward)(call);
}

void row_statistics(const TensorView& rows, const TensorView& key, const TensorView& mask, const TensorView& segments,
                    double scale, int num_threads, const TensorView& maximum, const TensorView& sum) {
    expect_rank("rows", rows, 4);
    expect_floating("rows", rows);
    expect_rows("rows", rows, rows);
    expect_rank("key", key, 4);
    RowStatistics call{};
    call.dtype = rows.dtype;
    call.B = rows.shape[0], call.N = rows.shape[1], call.H = rows.shape[2], call.D = rows.shape[3];
    call.J = key.shape[1];
    expect("key", key, call.dtype, {call.B, call.J, call.H, call.D});
    expect_adjacent_channels("key", key);
    if (mask.rank >= 0) call.mask = dense<bool>("mask", mask, DType::kBool, {call.B, call.J});
    expect_rank("segments", segments, 2);
    call.G = segments.shape[0];
    call.segments = dense<int64_t>("segments", segments, DType::kInt64, {call.G, 2});
    for (int64_t g = 0; g < call.G; ++g)
        if (call.segments[2 * g] < 0 || call.segments[2 * g + 1] > call.J)
            throw std::invalid_argument("segments must be within the keys");
    call.scale = scale, call.num_threads = num_threads;
    call.rows = rows, call.key = key;
    call.maximum = dense("maximum", maximum, accumulator(call.dtype), {call.B, call.N, call.G});
    call.sum = dense("sum", sum, accumulator(call.dtype), {call.B, call.N, call.G});
    TRITONKERN_KERNEL(query_key_matching, row_statistics)(call);
}

void frame_local_attention(const TensorView& query, const TensorView& key, const TensorView& value, int64_t text,
                           int64_t frames, bool text_last, bool renormalise, double scale, int num_threads,
                           const TensorView& out) {
    expect_rank("query", query, 4);
    expect_floating("query", query);
    expect_rows("query", query, query);
    expect_rows("key", key, query);
    expect_rows("value", value, query);
    FrameLocalAttention call{};
    call.dtype = query.dtype;
    call.B = query.shape[0], call.n = query.shape[1], call.H = query.shape[2], call.D = query.shape[3];
    call.text = text, call.frames = frames, call.text_last = text_last, call.renormalise = renormalise;
    if (text < 0 || frames < 0 || text > call.n || (frames ? (call.n - text) % frames : call.n != text))
        throw std::invalid_argument("query must have text + frames * S positions");
    call.scale = scale, call.num_threads = num_threads;
    call.query = query, call.key = key, call.value = value;
    call.out = dense("out", out, call.dtype, {call.B, call.n, call.H, call.D});
    TRITONKERN_KERNEL(query_key_matching, frame_local_attention)(call);
}

}  // namespace

TRITONKERN_BINDINGS(m) {
    using py::arg;
    m.def("query_key_matching_forward", forward, arg("query"), arg("key"), arg("cells"), arg("source"), arg("height"),
          arg("width"), arg("scale"), arg("symmetric"), arg("limit"), arg("num_threads"), arg("peak"), arg("points"),
          arg("index"), arg("weight"), Unlocked());
    m.def("query_key_matching_backward", backward, arg("grad_peak"), arg("grad_points"), arg("query"), arg("key"),
          arg("cells"), arg("index"), arg("points"), arg("weight"), arg("source"), arg("height"), arg("width"),
          arg("scale"), arg("symmetric"), arg("limit"), arg("num_threads"), arg("grad_query"), arg("grad_key"),
          Unlocked());
    m.def("query_key_cost_forward", cost_forward, arg("query"), arg("key"), arg("cells"), arg("source"), arg("scale"),
          arg("symmetric"), arg("num_threads"), arg("cost"), Unlocked());
    m.def("query_key_cost_backward", cost_backward, arg("grad_cost"), arg("query"), arg("key"), arg("cells"),
          arg("source"), arg("scale"), arg("symmetric"), arg("num_threads"), arg("grad_query"), arg("grad_key"),
          Unlocked());
    m.def("attention_row_statistics", row_statistics, arg("rows"), arg("key"), arg("mask"), arg("segments"),
          arg("scale"), arg("num_threads"), arg("maximum"), arg("sum"), Unlocked());
    m.def("frame_local_attention", frame_local_attention, arg("query"), arg("key"), arg("value"), arg("text"),
          arg("frames"), arg("text_last"), arg("renormalise"), arg("scale"), arg("num_threads"), arg("out"),
          Unlocked());
}

}  // namespace tritonkern
