"""LocoTrackRefiner: the official model's results from its state dict, and other trackers' tracks refined."""

import pytest
import torch
from official import needs_official, official  # noqa: F401

from tritonkern.models import LocoTrackRefiner, TrackerOutput


def clip(frames=3, queries=5):
    video = torch.rand(1, frames, 256, 256, 3) * 2 - 1
    times = torch.arange(queries) % frames
    return video, torch.cat([times[None, :, None].float(), torch.rand(1, queries, 2) * 256], -1)


def start(frames=3, queries=5):
    return TrackerOutput(torch.rand(1, queries, frames, 2) * 256, *torch.randn(2, 1, queries, frames))


@pytest.fixture(scope="module")
def refiner():
    torch.manual_seed(0)
    return LocoTrackRefiner("small").eval()


@torch.no_grad()
def test_refines_what_it_is_given(refiner):
    video, queries = clip()
    given = start()
    refined = refiner(video, queries, given)
    assert 1e-3 < (refined.tracks - given.tracks).abs().max() < 50
    assert not torch.equal(refined.occlusion, given.occlusion)
    # From its own features, or the same ones computed before
    again = refiner.refine(refiner.features(video), queries, given)
    assert torch.equal(again.tracks, refined.tracks)
    # The last two of four steps start where the first two end.
    short = LocoTrackRefiner("small", steps=2)
    short.load_state_dict(refiner.state_dict())
    halfway = short(video, queries, given)
    torch.testing.assert_close(short(video, queries, halfway).tracks, refined.tracks, atol=1e-4, rtol=0)


@torch.no_grad()
def test_queries_are_independent_and_empty_ones_allowed(refiner):
    video, queries = clip()
    together = refiner(video, queries)
    alone = refiner(video, queries[:, 2:3])
    torch.testing.assert_close(alone.tracks, together.tracks[:, 2:3], atol=1e-3, rtol=0)
    assert refiner(video, queries[:, :0]).tracks.shape == (1, 0, 3, 2)


def test_gradients_reach_every_parameter():
    model = LocoTrackRefiner("base", steps=1)
    video, queries = clip(frames=2, queries=2)
    features = model.features(video)
    match = model.refine(features, queries)
    sum(x.square().mean() for x in match).backward()
    # As in the official code a step's gradient ends at its guess: the first match needs a loss of its own.
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {"cost_conv.weight", "cost_conv.bias", "occ_linear.weight", "occ_linear.bias"}


@pytest.mark.parametrize("size", ["base", "small"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_checkpoints_of_both_sizes(tmp_path, size, prefix):
    model = LocoTrackRefiner(size)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "locotrack.ckpt")
    loaded = LocoTrackRefiner.from_checkpoint(tmp_path / "locotrack.ckpt")
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    del state[prefix + "cost_conv.bias"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="cost_conv.bias"):
        LocoTrackRefiner.from_checkpoint(tmp_path / "damaged.pth")


def test_errors(refiner):
    video, queries = clip()
    with pytest.raises(ValueError, match="size must be one of base, small"):
        LocoTrackRefiner("large")
    with pytest.raises(ValueError, match=r"video must be \[B, T, 256, 256, 3\]"):
        refiner(video[:, :, :128], queries)
    with pytest.raises(ValueError, match=r"queries must be \[1, N, 3\]"):
        refiner(video, queries[..., :2])
    with pytest.raises(ValueError, match=r"start.tracks must be \[1, 5, 3, 2\]"):
        refiner(video, queries, start(frames=2))
    with pytest.raises(TypeError, match="video must be floating point"):
        refiner(video.int(), queries)


@needs_official
@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "small"])
@torch.no_grad()
def test_official(official, size):  # noqa: F811
    torch.manual_seed(0)
    theirs = official("locotrack/locotrack_pytorch", "models.locotrack_model").LocoTrack(model_size=size).eval()
    ours = LocoTrackRefiner(size).eval()
    ours.load_state_dict(theirs.state_dict())
    video, queries = clip(queries=20)
    expected, actual = theirs(video, queries), ours(video, queries)
    difference = (actual.tracks - expected["tracks"]).abs().max().item()
    print(f"tracks differ by at most {difference:.1e} pixels")
    assert difference < 1e-3
    # Logits: no farther from float64 than twice the official code's own float32
    exact = ours.double()(video.double(), queries.double())
    for logits, theirs_, oracle in (
        (actual.occlusion, expected["occlusion"], exact.occlusion),
        (actual.expected_distance, expected["expected_dist"], exact.expected_distance),
    ):
        error, own_error = ((x - oracle).abs().max().item() for x in (logits, theirs_))
        print(f"logits: error {error:.1e}, the official code's own {own_error:.1e}")
        assert error <= 2 * own_error + torch.finfo(torch.float32).eps * oracle.abs().max().item()
