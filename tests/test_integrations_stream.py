"""`tritonkern.patch(model, stream=True)`: CoTracker3 online as a faster schedule, on a structural twin."""

import copy
import warnings

import pytest
import torch
from cotracker_like import Offline, Online, Predictor
from test_integrations_cotracker import clip, steps
from torch import nn

import tritonkern

pytestmark = pytest.mark.filterwarnings("ignore:tritonkern.patch.stream=True")


def predictor_and_clip(frames=16, batch=1):
    torch.manual_seed(0)
    video, queries = clip(frames=frames, batch=batch)
    queries[..., 0] = queries[..., 0].clamp(max=3)  # all begin in the first half of the first window
    return Predictor(Online()), video, queries


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_first_window_is_exact_and_the_difference_of_the_second_is_reported(batch):
    predictor, video, queries = predictor_and_clip(batch=batch)
    expected = steps(predictor, video, queries)
    with tritonkern.patch(predictor, stream=True) as handle:
        with pytest.warns(UserWarning, match="in the first window with frames of the last one, tracks differ") as found:
            actual = steps(predictor, video, queries)
        assert len([w for w in found if "stream" in str(w.message)]) == 1
        mean, largest = handle.stream_difference
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = steps(predictor, video, queries)
    torch.testing.assert_close(actual[0][0], expected[0][0], atol=1e-3, rtol=0)
    distance = (actual[1][0] - expected[1][0]).norm(dim=-1)
    assert (mean, largest) == pytest.approx((distance.mean().item(), distance.max().item()), rel=1e-3, abs=1e-3)
    assert 0.01 < mean < largest
    for (tracks, _), (others, _) in zip(again, actual, strict=True):
        assert torch.equal(tracks, others)


@torch.no_grad()
def test_work_of_a_window():
    """Half the features, half the correlations, one iteration."""
    predictor, video, queries = predictor_and_clip(frames=12)
    model, points, rows, calls = predictor.model, queries.shape[1], [], []
    model.corr_mlp.fc2.register_forward_hook(lambda module, args, result: rows.append(len(result)))
    model.updateformer.register_forward_hook(lambda module, args, result: calls.append(1))
    with tritonkern.patch(predictor, stream=True, verify=False) as handle:
        predictor(video[:, :8], queries, is_first_step=True)
        predictor(video[:, :8])
        assert rows == [8 * points] * 3 * 3 and len(calls) == 3 and model.fnet.frames == 8
        predictor(video[:, 4:])
        assert rows[9:] == [4 * points] * 3 and len(calls) == 4 and model.fnet.frames == 12
        assert handle.stream_difference is None


class Still(nn.Module):
    """An update that leaves everything where it is, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tokens, add_space_attn=True):
        self.seen.append(tokens)
        return tokens.new_zeros(*tokens.shape[:3], 4)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@torch.no_grad()
def test_what_is_reused_is_what_would_be_computed(precision):
    """Points that do not move have the same correlations again."""
    predictor, video, queries = predictor_and_clip(frames=16, batch=2)
    predictor.model.updateformer = still = Still()
    steps(predictor, video, queries)
    expected, still.seen = still.seen[::3], []
    with tritonkern.patch(predictor, precision=precision, stream=True, verify=False):
        steps(predictor, video, queries)
    actual = [still.seen[0], *still.seen[3:]]
    assert len(actual) == len(expected) == 3
    for tokens, others in zip(actual, expected, strict=True):
        atol = 1e-5 if precision == "float32" else 0.02 * others.abs().max().item()
        torch.testing.assert_close(tokens, others, atol=atol, rtol=0)


@torch.no_grad()
def test_windows_that_share_nothing_are_exact():
    predictor, video, queries = predictor_and_clip(frames=12)
    late, other = queries.clone(), video.clone()
    late[0, 3, 0] = 9  # begins in the second window
    other[0, 5, 1, 2, 3] += 40

    def run(video, queries):
        predictor(video[0][:, :8], queries, is_first_step=True)
        return [predictor(part[:, start : start + 8])[0] for start, part in zip((0, 4), video, strict=True)]

    for clips, asked in (((video, video), late), ((video, other), queries)):
        expected = run(clips, asked)
        with tritonkern.patch(predictor, stream=True) as handle:
            run((video, video), queries)
            before = handle.stream_difference
            actual = run(clips, asked)
            assert handle.stream_difference == before
        for tracks, others in zip(actual, expected, strict=True):
            torch.testing.assert_close(tracks, others, atol=1e-3, rtol=0)


@torch.no_grad()
def test_other_points_of_the_same_number_share_nothing():
    predictor, video, queries = predictor_and_clip(frames=12)

    def run():
        predictor(video[:, :8], queries, is_first_step=True)
        predictor(video[:, :8])
        predictor.queries = predictor.queries + predictor.queries.new_tensor([0, 5, 3])
        return predictor(video[:, 4:12])[0]

    expected = run()
    with tritonkern.patch(predictor, stream=True):
        torch.testing.assert_close(run(), expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_copies_have_windows_of_their_own():
    predictor, video, queries = predictor_and_clip()
    with tritonkern.patch(predictor, stream=True, verify=False):
        twin = copy.deepcopy(predictor)
        for parameter in twin.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
        both = predictor, twin
        alone = [steps(model, video, queries) for model in both]
        for model in both:
            model(video[:, :8], queries, is_first_step=True)
        for index, start in enumerate(range(0, 12, 4)):
            for model, expected in zip(both, alone, strict=True):
                assert torch.equal(model(video[:, start : start + 8])[0], expected[index][0])


def test_only_for_the_online_model():
    with pytest.raises(ValueError, match="stream: only CoTracker3's online model"):
        tritonkern.patch(Offline(), stream=True)
