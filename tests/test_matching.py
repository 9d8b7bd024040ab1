"""The matching head against plain loops in float64, at its ties and borders, and its gradient."""

import math

import pytest
import torch
import torch.nn.functional as F

from tritonkern.models import matching
from tritonkern.models.matching import MatchingTracker, TrackerOutput


class Tracker(MatchingTracker):
    resolution = (48, 64)

    def features(self, video):
        return F.normalize(F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), 8).movedim(1, -1), dim=-1).unflatten(
            0, video.shape[:2]
        )


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
    model = Tracker().double()
    output = model.track(features, queries)
    assert output.tracks.shape == (2, 9, frames, 2)
    for b in range(2):
        for n in range(9):
            points, statistics, _ = tracked(features[b], queries[b, n], model.resolution)
            torch.testing.assert_close(output.tracks[b, n], points, atol=1e-10, rtol=0)
            logits = model.occ_linear(statistics)
            torch.testing.assert_close(output.occlusion[b, n], logits[:, 0], atol=1e-12, rtol=0)
            torch.testing.assert_close(output.expected_distance[b, n], logits[:, 1], atol=1e-12, rtol=0)


def test_float32_follows_the_exact_answer_or_a_candidate_of_a_tie():
    features, queries = random_inputs(queries=40)
    tracks = Tracker().track(features.float(), queries.float()).tracks.double()
    features, queries = features.float().double(), queries.float().double()
    for b in range(2):
        for n in range(40):
            points, _, gaps = tracked(features[b], queries[b, n], Tracker.resolution)
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
    tracks = Tracker().track(peaks((2, 3), (9, 12)), CORNER).tracks
    torch.testing.assert_close(tracks[0, 0, 1], torch.tensor([14.0, 10.0]), atol=1e-4, rtol=0)


def test_near_tie_gives_one_of_the_candidates():
    features = peaks((2, 3), (9, 12))
    features[0, 1, 9, 12, 0] = 1 + torch.finfo(torch.float32).eps
    point = Tracker().track(features, CORNER).tracks[0, 0, 1]
    candidates = torch.tensor([[14.0, 10.0], [50.0, 38.0]])
    assert (point - candidates).norm(dim=-1).min() < 1e-4


def test_radius_is_strict():
    model = Tracker()
    # Distance exactly 5 (3, 4): outside. Distance sqrt(20) (2, 4): inside, and pulls the point half-way.
    outside = model.track(peaks((2, 3), (5, 7)), CORNER).tracks[0, 0, 1]
    torch.testing.assert_close(outside, torch.tensor([14.0, 10.0]), atol=1e-4, rtol=0)
    inside = model.track(peaks((2, 3), (4, 7)), CORNER).tracks[0, 0, 1]
    torch.testing.assert_close(inside, torch.tensor([22.0, 14.0]), atol=1e-4, rtol=0)


def test_own_frame_is_the_query_and_halves_round_to_even():
    features, _ = random_inputs(batch=1, frames=4)
    times = torch.tensor([0.5, 1.5, 2.5, 2.0], dtype=torch.float64)
    queries = torch.stack([times, torch.full_like(times, 11.25), torch.full_like(times, 30.5)], dim=-1)[None]
    tracks = Tracker().double().track(features, queries).tracks[0]
    own = (tracks == torch.tensor([30.5, 11.25], dtype=torch.float64)).all(-1)
    assert own.int().argmax(-1).tolist() == [0, 2, 2, 2]
    assert own.sum() == 4


def test_chunks_change_nothing(monkeypatch):
    features, queries = random_inputs(queries=11)
    model = Tracker().double()
    whole = model.track(features, queries)
    monkeypatch.setattr(matching, "_COST_VOLUME_LIMIT", 3 * features[..., 0].numel())
    for expected, actual in zip(whole, model.track(features, queries), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("batch, queries", [(2, 0), (0, 3)])
def test_empty(batch, queries):
    features, positions = random_inputs(batch=batch, queries=queries)
    output = Tracker().double().track(features, positions)
    assert output.tracks.shape == (batch, queries, 3, 2)
    assert output.occlusion.shape == output.expected_distance.shape == (batch, queries, 3)


def test_gradient_against_finite_differences():
    features, queries = random_inputs(batch=1, frames=2, rows=6, columns=7, channels=4, queries=3)
    queries[..., 0] = torch.tensor([0.3, 1.0, 0.7])
    queries[..., 1:] = queries[..., 1:].clamp(5, 40)
    model = Tracker().double()

    def points(features, positions):
        return model.track(features, torch.cat([queries[..., :1], positions], dim=-1)).tracks

    inputs = (features.requires_grad_(), queries[..., 1:].clone().requires_grad_())
    assert torch.autograd.gradcheck(points, inputs)


def test_visibility_trains_the_head_but_not_the_features():
    features, queries = random_inputs()
    features.requires_grad_()
    model = Tracker().double()
    output = model.track(features, queries)
    (output.occlusion.sum() + output.expected_distance.sum()).backward()
    assert features.grad is None
    assert model.occ_linear.weight.grad.abs().min() > 0


def test_autocast_does_not_touch_the_matching():
    features, queries = random_inputs(dtype=torch.float32)
    model = Tracker()
    expected = model.track(features, queries)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model.track(features, queries)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_nan_poisons_what_depends_on_it():
    features, queries = random_inputs(batch=1)
    queries[0, :, 0] = torch.linspace(0, 1, 9, dtype=torch.float64).round()
    model = Tracker().double()
    clean = model.track(features, queries)

    others = [n for n in range(9) if n != 4]
    for coordinate in range(3):
        broken = queries.clone()
        broken[0, 4, coordinate] = torch.nan
        output = model.track(features, broken)
        assert output.tracks[0, 4, 2].isnan().all() and output.occlusion[0, 4].isnan().all()
        assert torch.equal(output.tracks[0, others], clean.tracks[0, others])

    features[0, 2, 3, 3] = torch.nan
    output = model.track(features, queries)
    assert output.tracks[0, :, 2].isnan().all() and output.occlusion[0, :, 2].isnan().all()
    assert torch.equal(output.tracks[0, :, :2], clean.tracks[0, :, :2])


def test_forward_tracks_features_of_the_video():
    model = Tracker()
    video = torch.rand(1, 2, 48, 64, 3) * 2 - 1
    queries = torch.tensor([[[1.0, 20.0, 30.0]]])
    expected = model.track(model.features(video), queries)
    assert torch.equal(model(video, queries).tracks, expected.tracks)


def test_state_dict_is_the_linear_layer_alone():
    assert list(Tracker().state_dict()) == ["occ_linear.weight", "occ_linear.bias"]


@pytest.mark.parametrize(
    "video, queries, error, match",
    [
        (torch.zeros(1, 2, 64, 48, 3), torch.zeros(1, 1, 3), ValueError, r"resize the frames to 48x64"),
        (torch.zeros(1, 0, 48, 64, 3), torch.zeros(1, 1, 3), ValueError, r"T >= 1"),
        (torch.zeros(1, 2, 48, 64, 3, dtype=torch.uint8), torch.zeros(1, 1, 3), TypeError, "video / 127.5 - 1"),
        (torch.zeros(1, 2, 48, 64, 3), torch.zeros(1, 1, 2), ValueError, r"\[1, N, 3\]"),
        (torch.zeros(1, 2, 48, 64, 3), torch.zeros(2, 1, 3), ValueError, r"\[1, N, 3\]"),
        (torch.zeros(1, 2, 48, 64, 3), torch.zeros(1, 1, 3, dtype=torch.long), TypeError, "queries.float"),
    ],
)
def test_errors(video, queries, error, match):
    with pytest.raises(error, match=match):
        Tracker()(video, queries)


def test_bad_features():
    with pytest.raises(ValueError, match="features must be"):
        Tracker().track(torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="at least one frame"):
        Tracker().track(torch.zeros(2, 0, 3, 4, 5), torch.zeros(2, 1, 3))


def test_visible():
    # (1 - sigmoid(occlusion)) * (1 - sigmoid(expected_distance)): 0.5 * 1, 0.73 * 0.73, 0.73 * 0.5, nothing known.
    occlusion = torch.tensor([[[0.0, -1.0, -1.0, torch.nan]]])
    expected_distance = torch.tensor([[[-torch.inf, -1.0, 0.0, -9.0]]])
    output = TrackerOutput(torch.zeros(1, 1, 4, 2), occlusion, expected_distance)
    assert output.visible.tolist() == [[[True, True, False, False]]]
