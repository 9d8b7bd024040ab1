import pytest
import torch

from tritonkern.models import Nano, build_model, chrono_nano, nano, packaged
from tritonkern.models.nano import Refiner, _from_neighbours, make_maps
from tritonkern.nn.correlation import TrackerOutput

FRAMES = 3


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return Nano.from_chrono(packaged("chrono-nano")).eval()


@pytest.fixture(scope="module")
def features(untrained):
    with torch.inference_mode():
        return untrained.features(sliding())


def texture(size=320, seed=0):
    """`[size, size, 3]` in [-1, 1], smooth over a few pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, size // 4, size // 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0].clamp(-1, 1).movedim(0, -1)


def sliding(frames=FRAMES, step=(3, 2)):
    """A texture that moves by `step` pixels (x, y) a frame, `[1, T, 256, 256, 3]`."""
    picture = texture()
    corner = [(32 - step[1] * t, 32 - step[0] * t) for t in range(frames)]
    return torch.stack([picture[y : y + 256, x : x + 256] for y, x in corner])[None]


def grid(frame=0.0):
    axis = torch.linspace(60, 196, 2)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.full_like(x, frame), y, x], -1).flatten(0, 1)[None]


def test_shapes_and_the_query_frame(untrained, features):
    queries = torch.cat([grid(0.0), grid(2.0)], 1)
    with torch.inference_mode():
        output = untrained.track(features, queries)
    assert output.tracks.shape == (1, 8, FRAMES, 2) and output.occlusion.shape == (1, 8, FRAMES)
    own = output.tracks[0, torch.arange(8), queries[0, :, 0].long()]
    torch.testing.assert_close(own, queries[0, :, [2, 1]])
    assert output.visible[0, torch.arange(8), queries[0, :, 0].long()].all()


@torch.no_grad()
def test_hooks_of_the_parts_run_where_refine_is_called(features):
    """As users call it, and not through the module itself."""
    model, ran = Nano(32, 2, 2, 16, 16).eval(), set()
    parts = {
        name: part for name, part in model.named_modules() if name.startswith("refiner") and name != "refiner.blocks"
    }
    parts["occ_linear"] = model.occ_linear
    for name, part in parts.items():
        part.register_forward_hook(lambda *_, name=name: ran.add(name))
    model.refine(features, grid())
    assert ran == set(parts)


def test_points_do_not_depend_on_each_other(untrained, features, monkeypatch):
    queries = grid()
    with torch.inference_mode():
        together = untrained.track(features, queries)
        monkeypatch.setattr(nano, "_POSITIONS", 3 * FRAMES)
        apart = untrained.track(features, queries)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_track_is_the_last_step_with_lower_logits(untrained, features):
    with torch.inference_mode():
        tracked, refined = untrained.track(features, grid()), untrained.refine(features, grid())[-1].output
    torch.testing.assert_close(tracked.tracks, refined.tracks)
    for one, other in zip(tracked[1:], refined[1:], strict=True):
        torch.testing.assert_close(one, other - 0.5)


def test_features_are_half_precision_only_without_gradients(untrained, features, monkeypatch):
    full = untrained.features(sliding())
    shapes = [(1, FRAMES, 128, 128, 32), (1, FRAMES, 64, 64, 128), (1, FRAMES, 32, 32, 128)]
    for half, single, shape in zip(features, full, shapes, strict=True):
        assert half.dtype == torch.float16 and single.dtype == torch.float32 and half.shape == single.shape == shape
        torch.testing.assert_close(half.float(), single, atol=1e-3, rtol=1e-3)
        norm = half.float().norm(dim=-1)
        torch.testing.assert_close(norm, torch.ones_like(norm), atol=2e-3, rtol=0)
    monkeypatch.setattr(chrono_nano, "_BLOCK", 2)
    with torch.inference_mode():
        for parts, whole in zip(untrained.features(sliding()), features, strict=True):
            torch.testing.assert_close(parts, whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ahead", [(0, 0), (2, -1), (-3, 3)])
def test_the_logits_peak_at_the_true_displacement(ahead):
    """Maps of random vectors that move by whole cells: at each scale the true displacement has the largest logit."""
    generator = torch.Generator().manual_seed(1)
    maps, supports, dx, dy = [], [], *ahead
    for cells in (128, 64, 32):
        first = torch.nn.functional.normalize(torch.randn(cells, cells, 16, generator=generator), dim=-1)
        maps.append(torch.stack([first, first.roll((dy, dx), (0, 1))])[None])
        middle = cells // 2
        supports.append(first[middle - 3 : middle + 4, middle - 3 : middle + 4].reshape(1, 1, 49, 16))
    # The centre of the middle cell is different at each scale, so that each is asked on its own.
    refiner = Refiner()
    index = (dy + 3) * 7 + dx + 3
    for level, cells in enumerate((128, 64, 32)):
        place = torch.full((1, 1, 2, 2), (cells // 2 + 0.5) * 256 / cells)
        guess = TrackerOutput(place, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
        step = refiner(maps, supports, torch.zeros(1, 1, 2, 4), place, guess)
        assert step.logits[0, 0, 0, level].argmax() == 24
        assert step.logits[0, 0, 1, level].argmax() == index


def test_neighbours_continue_a_line_across_an_outlier():
    time = torch.arange(12.0)
    truth = torch.stack([5 + 2 * time, 40 - time], -1)[None, None]
    tracks, confidence = truth.clone(), torch.ones(1, 1, 12)
    tracks[0, 0, 5] += 50
    confidence[0, 0, 5] = 0
    step, known = _from_neighbours(tracks, confidence, 1.5)
    assert (tracks + step - truth)[0, 0, 5].abs().max() < 0.1
    # Its own weight is nothing, and frames without confident neighbours propose no step.
    step, known = _from_neighbours(tracks, torch.zeros(1, 1, 12), 1.5)
    assert (step == 0).all() and (known < 1e-3).all()


def test_every_learnt_parameter_gets_a_gradient(untrained):
    model = untrained
    for parameter in model.refiner.output.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    video = sliding(3)
    with torch.no_grad():
        cells = model.cells(video)
    steps = model.refine(make_maps(model.fine(video), cells), grid())
    sum(
        (s.output.tracks - 100).square().sum() + s.output.occlusion.sum() + s.output.expected_distance.sum()
        for s in steps
    ).backward()
    learnt = {n: p for n, p in model.named_parameters() if n.startswith(("fine.", "refiner."))}
    assert [n for n, p in learnt.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model.zero_grad(set_to_none=True)


def test_way_back_of_a_still_scene_is_the_query():
    model = build_model("chrono-nano")
    video = sliding(2, step=(0, 0))
    queries = grid(1.0)
    with torch.inference_mode():
        features = model.features(video)
        right = queries[:, :, None, [2, 1]].repeat(1, 1, 2, 1)
        back = model.way_back(features, queries, right)
        assert (back - right).norm(dim=-1).median() < 2
        wrong = model.way_back(features, queries, right + 40)
        assert (wrong - right).norm(dim=-1).median() > 30


class TestPackagedWeights:
    def test_size(self):
        model = build_model("nano")
        assert sum(p.numel() for p in model.parameters()) < 4e6
        assert packaged("nano").stat().st_size < 8e6
        assert not model.training

    def test_a_sliding_texture_is_followed_below_a_pixel(self):
        video, queries = sliding(4), grid()
        with torch.inference_mode():
            output = build_model("nano")(video, queries)
        truth = queries[:, :, None, [2, 1]] + torch.arange(4.0)[:, None] * torch.tensor([3.0, 2.0])
        error = (output.tracks - truth).norm(dim=-1)
        assert error.median() < 0.5 and (error < 1).float().mean() > 0.9
        assert output.visible.float().mean() > 0.9

    def test_another_models_weights_are_refused(self):
        with pytest.raises(ValueError, match="does not fit Nano: .* missing: fine.conv1"):
            build_model("nano", packaged("chrono-nano"))
