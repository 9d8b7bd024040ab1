"""The layer `CorrelationSoftArgmax` against plain loops in float64, at its ties and borders, and its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import growth, match_cost, match_eager

from tritonkern import CorrelationSoftArgmax
from tritonkern.nn import TrackerOutput
from tritonkern.nn import correlation as correlation_module

RESOLUTION = (48, 64)


def layer():
    return CorrelationSoftArgmax(RESOLUTION)


def random_inputs(batch=2, frames=3, rows=12, columns=16, channels=5, queries=9, dtype=torch.float64):
    features = F.normalize(torch.randn(batch, frames, rows, columns, channels, dtype=dtype), dim=-1)
    # Reaches beyond every border, and into fractions of a frame.
    positions = torch.rand(batch, queries, 3, dtype=dtype) * torch.tensor([frames, 56.0, 72.0]) - torch.tensor(
        [0.5, 4, 4]
    )
    positions[:, ::2, 0] = positions[:, ::2, 0].round().clamp(0, frames - 1)
    return features, positions


def sampled(features, t, y, x):
    """Trilinear sample of [T, h, w, C], its three axes clamped."""
    coordinates = [min(max(p, 0.0), size - 1.0) for p, size in zip((t, y - 0.5, x - 0.5), features.shape, strict=False)]
    result = 0
    for corner in range(8):
        weight, index = 1.0, []
        for axis, p in enumerate(coordinates):
            low = math.floor(p)
            up = corner >> axis & 1
            weight *= p - low if up else 1 - (p - low)
            index.append(min(low + up, features.shape[axis] - 1))
        result = result + weight * features[tuple(index)]
    return result


def tracked(features, query, resolution, best_cell=None):
    """One query, one loop a frame: [T, 2] points, [T, 3] statistics, [T] gap between the two best cells."""
    frames, rows, columns, _ = features.shape
    scale_y, scale_x = resolution[0] / rows, resolution[1] / columns
    t, y, x = query.tolist()
    query_feature = sampled(features, t, y / scale_y, x / scale_x)
    points, statistics, gaps = [], [], []
    for frame in range(frames):
        cost = (features[frame] * query_feature).sum(-1)
        flat = cost.flatten().tolist()
        best = flat.index(max(flat)) if best_cell is None else best_cell[frame]
        probability = (cost * 20).flatten().softmax(0).tolist()
        total = sum_x = sum_y = 0.0
        for cell, p in enumerate(probability):
            distance = (cell // columns - best // columns) ** 2 + (cell % columns - best % columns) ** 2
            if distance < 25:
                total += p
                sum_y += p * (cell // columns + 0.5)
                sum_x += p * (cell % columns + 0.5)
        point = (sum_x / total * scale_x, sum_y / total * scale_y)
        points.append((x, y) if round(t) == frame else point)
        statistics.append((sum(flat) / len(flat), max(flat), min(flat)))
        gaps.append(flat[best] - max(v for cell, v in enumerate(flat) if cell != best))
    return torch.tensor(points, dtype=torch.float64), torch.tensor(statistics, dtype=torch.float64), gaps


@pytest.mark.parametrize("frames", [1, 3])
def test_matches_plain_loops(frames):
    features, queries = random_inputs(frames=frames)
    model = layer().double()
    output = model(queries, features)
    assert output.tracks.shape == (2, 9, frames, 2)
    for b in range(2):
        for n in range(9):
            points, statistics, _ = tracked(features[b], queries[b, n], RESOLUTION)
            torch.testing.assert_close(output.tracks[b, n], points, atol=1e-10, rtol=0)
            logits = model.occ_linear(statistics)
            torch.testing.assert_close(output.occlusion[b, n], logits[:, 0], atol=1e-12, rtol=0)
            torch.testing.assert_close(output.expected_distance[b, n], logits[:, 1], atol=1e-12, rtol=0)


def test_float32_follows_the_exact_answer_or_a_candidate_of_a_tie():
    features, queries = random_inputs(queries=40)
    tracks = layer()(queries.float(), features.float()).tracks.double()
    features, queries = features.float().double(), queries.float().double()
    for b in range(2):
        for n in range(40):
            points, _, gaps = tracked(features[b], queries[b, n], RESOLUTION)
            clear = torch.tensor([gap > 1e-6 for gap in gaps])
            torch.testing.assert_close(tracks[b, n][clear], points[clear], atol=1e-4, rtol=0)


def peaks(*cells, rows=12, columns=16):
    """Features of one frame that equal the query's at `cells` and are orthogonal to it elsewhere."""
    features = torch.zeros(1, 2, rows, columns, 2)
    features[..., 1] = 1
    features[0, 0, 0, 0] = torch.tensor([1.0, 0.0])
    for y, x in cells:
        features[0, 1, y, x] = torch.tensor([1.0, 0.0])
    return features


# Frame 0, at the centre of cell (0, 0), which covers 4 x 4 pixels.
CORNER = torch.tensor([[[0.0, 2.0, 2.0]]])


def test_first_of_equal_peaks_wins():
    tracks = layer()(CORNER, peaks((2, 3), (9, 12))).tracks
    torch.testing.assert_close(tracks[0, 0, 1], torch.tensor([14.0, 10.0]), atol=1e-4, rtol=0)


def test_near_tie_gives_one_of_the_candidates():
    features = peaks((2, 3), (9, 12))
    features[0, 1, 9, 12, 0] = 1 + torch.finfo(torch.float32).eps
    point = layer()(CORNER, features).tracks[0, 0, 1]
    candidates = torch.tensor([[14.0, 10.0], [50.0, 38.0]])
    assert (point - candidates).norm(dim=-1).min() < 1e-4


def test_radius_is_strict():
    model = layer()
    # Distance exactly 5 (3, 4): outside. Distance sqrt(20) (2, 4): inside, and moves the point half-way.
    outside = model(CORNER, peaks((2, 3), (5, 7))).tracks[0, 0, 1]
    torch.testing.assert_close(outside, torch.tensor([14.0, 10.0]), atol=1e-4, rtol=0)
    inside = model(CORNER, peaks((2, 3), (4, 7))).tracks[0, 0, 1]
    torch.testing.assert_close(inside, torch.tensor([22.0, 14.0]), atol=1e-4, rtol=0)


def test_own_frame_is_the_query_and_halves_round_to_even():
    features, _ = random_inputs(batch=1, frames=4)
    times = torch.tensor([0.5, 1.5, 2.5, 2.0], dtype=torch.float64)
    queries = torch.stack([times, torch.full_like(times, 11.25), torch.full_like(times, 30.5)], dim=-1)[None]
    tracks = layer().double()(queries, features).tracks[0]
    own = (tracks == torch.tensor([30.5, 11.25], dtype=torch.float64)).all(-1)
    assert own.int().argmax(-1).tolist() == [0, 2, 2, 2]
    assert own.sum() == 4


def test_queries_do_not_depend_on_each_other():
    features, queries = random_inputs(queries=11)
    model = layer().double()
    together = model(queries, features)
    for n in (0, 4, 10):
        for whole, alone in zip(together, model(queries[:, n : n + 1], features), strict=True):
            torch.testing.assert_close(alone[:, 0], whole[:, n], atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch, queries", [(2, 0), (0, 3)])
def test_empty(batch, queries):
    features, positions = random_inputs(batch=batch, queries=queries)
    output = layer().double()(positions, features)
    assert output.tracks.shape == (batch, queries, 3, 2)
    assert output.occlusion.shape == output.expected_distance.shape == (batch, queries, 3)


def test_gradient_against_finite_differences():
    features, queries = random_inputs(batch=1, frames=2, rows=6, columns=7, channels=4, queries=3)
    queries[..., 0] = torch.tensor([0.3, 1.0, 0.7])
    queries[..., 1:] = queries[..., 1:].clamp(5, 40)
    model = layer().double()

    def points(features, positions):
        return model(torch.cat([queries[..., :1], positions], dim=-1), features).tracks

    inputs = (features.requires_grad_(), queries[..., 1:].clone().requires_grad_())
    assert torch.autograd.gradcheck(points, inputs)


def test_visibility_trains_the_head_but_not_the_features():
    features, queries = random_inputs()
    features.requires_grad_()
    model = layer().double()
    output = model(queries, features)
    (output.occlusion.sum() + output.expected_distance.sum()).backward()
    assert features.grad is None
    assert model.occ_linear.weight.grad.abs().min() > 0


def test_autocast_does_not_touch_the_matching():
    features, queries = random_inputs(dtype=torch.float32)
    model = layer()
    expected = model(queries, features)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(queries, features)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_nan_poisons_what_depends_on_it():
    features, queries = random_inputs(batch=1)
    queries[0, :, 0] = torch.linspace(0, 1, 9, dtype=torch.float64).round()
    model = layer().double()
    clean = model(queries, features)

    others = [n for n in range(9) if n != 4]
    for coordinate in range(3):
        broken = queries.clone()
        broken[0, 4, coordinate] = torch.nan
        output = model(broken, features)
        assert output.tracks[0, 4, 2].isnan().all() and output.occlusion[0, 4].isnan().all()
        assert torch.equal(output.tracks[0, others], clean.tracks[0, others])

    features[0, 2, 3, 3] = torch.nan
    output = model(queries, features)
    assert output.tracks[0, :, 2].isnan().all() and output.occlusion[0, :, 2].isnan().all()
    assert torch.equal(output.tracks[0, :, :2], clean.tracks[0, :, :2])


def test_tokens_of_a_vision_transformer_are_read_in_place():
    tokens = torch.randn(2 * 3, 1 + 12 * 16, 8)  # a class token before the patches of each frame
    patches = tokens[:, 1:].unflatten(1, (12, 16)).unflatten(0, (2, 3))
    _, queries = random_inputs(dtype=torch.float32)
    model = layer()
    for actual, expected in zip(model(queries, patches), model(queries, patches.contiguous()), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_features_give_float32_tracks(dtype):
    """Nothing is rounded but the query's feature: cells that hold 16-bit numbers exactly give exact tracks."""
    features, queries = random_inputs(dtype=torch.float32, channels=64)
    queries[..., 0] = queries[..., 0].round().clamp(0, 2)
    queries[..., 1:] = (queries[..., 1:].clamp(0, 47) // 4) * 4 + 2  # centres of cells
    half = features.to(dtype)
    results = layer()(queries, half), layer()(queries, half.float())
    torch.testing.assert_close(results[0].tracks, results[1].tracks, atol=1e-4, rtol=0)
    assert {x.dtype for x in results[0]} == {torch.float32}


def test_compiled_as_one_graph():
    features, queries = random_inputs(dtype=torch.float32)
    model = layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(queries, features), model(queries, features), strict=True):
        torch.testing.assert_close(actual, expected)


def test_parameters_are_those_of_the_official_head():
    assert {name: tuple(x.shape) for name, x in layer().state_dict().items()} == {
        "occ_linear.weight": (2, 3),
        "occ_linear.bias": (2,),
    }


def test_bad_features():
    with pytest.raises(ValueError, match="features must be"):
        layer()(torch.zeros(2, 1, 3), torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="at least one frame"):
        layer()(torch.zeros(2, 1, 3), torch.zeros(2, 0, 3, 4, 5))


@pytest.mark.parametrize(
    "queries, error, match",
    [
        (torch.zeros(1, 1, 2), ValueError, r"\[1, N, 3\]"),
        (torch.zeros(2, 1, 3), ValueError, r"\[1, N, 3\]"),
        (torch.zeros(1, 1, 3, dtype=torch.long), TypeError, "queries must be floating point"),
    ],
)
def test_bad_queries(queries, error, match):
    with pytest.raises(error, match=match):
        layer()(queries, torch.zeros(1, 2, 3, 4, 5))


def test_visible():
    # (1 - sigmoid(occlusion)) * (1 - sigmoid(expected_distance)): 0.5 * 1, 0.73 * 0.73, 0.73 * 0.5, nothing known.
    occlusion = torch.tensor([[[0.0, -1.0, -1.0, torch.nan]]])
    expected_distance = torch.tensor([[[-torch.inf, -1.0, 0.0, -9.0]]])
    output = TrackerOutput(torch.zeros(1, 1, 4, 2), occlusion, expected_distance)
    assert output.visible.tolist() == [[[True, True, False, False]]]


def test_gradient_has_the_same_bits_run_after_run():
    """Many queries share few cells: PyTorch's indexing would add up their gradients in any order."""
    features, queries = random_inputs(1, 4, 8, 8, 64, 800, dtype=torch.float32)
    head = layer()

    def gradient():
        leaf = features.clone().requires_grad_()
        head(queries, leaf).tracks.square().sum().backward()
        return leaf.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    torch.use_deterministic_algorithms(False)  # PyTorch's own order must not be what is seen; conftest.py restores it
    try:
        first = gradient()
        assert first.abs().max() > 0
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


def test_constructor_errors():
    with pytest.raises(TypeError, match="resolution must be a pair"):
        CorrelationSoftArgmax(64)
    with pytest.raises(ValueError, match="must be positive, got -1"):
        CorrelationSoftArgmax(RESOLUTION, temperature=-1)


def test_features_in_16_bits_err_less_than_rounded_correlations():
    """Chrono on a GPU under autocast: sums of bfloat16 products, where the official code rounds each sum to bfloat16.

    Frames are noisy copies of one another, so that every query has one clear match.
    """
    clean = F.normalize(torch.randn(1, 1, 12, 16, 64, dtype=torch.float64), dim=-1)
    features = F.normalize(clean + 0.05 * torch.randn(1, 4, 12, 16, 64, dtype=torch.float64), dim=-1)
    queries = torch.rand(1, 40, 3, dtype=torch.float64) * torch.tensor([4.0, *RESOLUTION]) - torch.tensor([0.5, 0, 0])
    queries[..., 0] = queries[..., 0].round().clamp(0, 3)
    head = layer()
    half = features.bfloat16()
    exact = head.double()(queries, features).tracks
    ours = head.float()(queries.float(), half).tracks.double()
    cost = match_cost(head.query_features(half, queries.float()).bfloat16(), half)
    points, *_ = match_eager(cost.float(), 20.0, 5.0)
    official = points.double() * torch.tensor([RESOLUTION[1] / 16, RESOLUTION[0] / 12], dtype=torch.float64)
    own = queries[0, :, 0].long()
    others = torch.ones(1, 40, 4, dtype=torch.bool)
    others[0, torch.arange(40), own] = False  # the position of a query in its own frame is given
    errors = [(x - exact)[others].norm(dim=-1) for x in (ours, official)]
    assert errors[0].max() <= 2 * errors[1].max() and errors[0].mean() <= errors[1].mean() < 0.1


def test_transforms_of_samples():
    """`torch.func` takes no function with a backward pass of its own, so that another way leads through it."""
    features, places = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.rand(3, 2, 7, dtype=torch.float64) * 4

    def sample(features, places):
        return correlation_module.sample_features(features, *places)

    expected = sample(features, places)
    assert torch.equal(torch.vmap(sample, (0, None))(features[None], places)[0], expected)
    leaves = features.clone().requires_grad_(), places.clone().requires_grad_()
    grads = torch.autograd.grad(sample(*leaves).square().sum(), leaves)
    found = torch.func.grad(lambda *x: sample(*x).square().sum(), (0, 1))(features, places)
    for x, y in zip(found, grads, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_do_not_depend_on_the_blocks(monkeypatch, dtype):
    features, queries = random_inputs(queries=50)
    grad_out = torch.randn(2, 50, 5)

    def sampled():
        leaves = features.to(dtype).requires_grad_(), queries.requires_grad_()
        out = layer().query_features(*leaves)
        assert torch.equal(out.detach(), layer().query_features(*(x.detach() for x in leaves)))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]

    whole = sampled()
    monkeypatch.setitem(correlation_module._SAMPLED_BYTES, "cpu", 7 * 8 * 4 * 5 * 2)  # seven positions
    assert all(map(torch.equal, sampled(), whole))


# Features [1, T, h, w, C], the samples of which are measured, and their number of bytes.
SAMPLERS = {
    "query_features": (
        (1, 3, 16, 16, 768),
        "CorrelationSoftArgmax((64, 64)).query_features(features, queries(20_000))",
        20_000 * 768 * 4,
    ),
    "supports of LocoTrackRefiner": (
        (1, 3, 16, 16, 64),
        "LocoTrackRefiner._supports(LocoTrackRefiner, features, queries(10_000))",
        10_000 * 49 * 64 * 4,
    ),
    "supports of nano": ((1, 3, 16, 16, 32), "_supports(features.half(), queries(20_000), 4)", 20_000 * 49 * 32 * 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_memory_of_samples(name, needs_grad):
    """At most twice the result; with gradients, which need the weights of the corners, with those."""
    shape, call, size = SAMPLERS[name]
    prepare = f"""
        import torch
        from tritonkern.models import LocoTrackRefiner
        from tritonkern.models.nano import _supports
        from tritonkern.nn import CorrelationSoftArgmax
        features = torch.randn({shape}, requires_grad={needs_grad})
        def queries(count):
            return torch.rand(1, count, 3) * 40
    """
    measured = f"out = {call}\n" + ("out.sum().backward()" if needs_grad else "")
    indices = size // (shape[-1] * (2 if "nano" in name else 4)) * 150
    allowed = 2 * size + (size + indices if needs_grad else 0)
    assert 0.9 * size < growth(prepare, measured) * 2**20 < allowed + (16 << 20)
