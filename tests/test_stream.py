"""`PointTracker.stream`: what comes out is what an offline run over the same frames gives, whatever happens between."""

import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clips import ColourTracker, square_clip
from hypothesis import strategies as st
from test_stream_models import tiny_chrono
from torch import Tensor

from tritonkern.models import TAPIR, TAPIRFeatures
from tritonkern.models.tracker import Tracker
from tritonkern.nn.correlation import TrackerOutput
from tritonkern.tracking import PointTracker
from tritonkern.tracking.raster import resized
from tritonkern.tracking.stream_features import BACK


class Maps(NamedTuple):
    colours: Tensor
    brightness: Tensor


class Swaying(Tracker):
    """Tracks that depend on the query's colour and on all frames that are tracked together, the nearer the more."""

    resolution = (16, 16)
    context = 0

    def features(self, video):
        cells = F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), 4).movedim(1, -1).unflatten(0, video.shape[:2])
        return Maps(cells, cells.mean((2, 3, 4)))

    def evidence(self, features, queries):
        t, y, x = queries[0].unbind(-1)
        colour = features.colours[0, t.long(), (y / 4).long().clamp(0, 3), (x / 4).long().clamp(0, 3)]  # [N, 3]
        return (features.brightness[0][:, None] * colour[:, None])[None]  # [1, N, T, 3]

    def track(self, features, queries, evidence=None):
        found = self.evidence(features, queries) if evidence is None else evidence
        time = torch.arange(found.shape[2], dtype=found.dtype)
        near = (-(time[:, None] - time).abs() / 6).exp() @ found  # [1, N, T, 3]
        logits = 5 * near[..., 2]
        return TrackerOutput(queries[:, :, None, [2, 1]] + near[..., :2], logits, -logits / 2 - 3)


class Matching(ColourTracker):
    context = 0


def video(frames, size=(24, 20), seed=0):
    """Noise of a brightness that changes from frame to frame."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 255, (frames, size[1], size[0], 3), dtype=np.uint8)
    return (noise * random.random((frames, 1, 1, 1))).astype(np.uint8)


class Oracle:
    """Everything is kept, and every output is computed from all frames."""

    def __init__(self, model, lookahead):
        self.model, self.lookahead, self.frames, self.points, self.next = model, lookahead, [], {}, 0

    def features(self):
        rasters = np.stack([resized(frame, self.model.resolution) for frame in self.frames])
        return self.model.features(torch.from_numpy(rasters)[None].float() / 127.5 - 1)

    def add(self, points, frame):
        ids = range(self.next, self.next + len(points))
        self.points |= {number: (frame, *point) for number, point in zip(ids, points, strict=True)}
        self.next = ids.stop
        return list(ids)

    def output(self, t):
        features = self.features()
        begin, end = max(0, t - BACK), min(len(self.frames), t + self.lookahead + 1)
        scale = np.array([24 / 16, 20 / 16])
        found = {}
        for number, (frame, x, y) in self.points.items():
            if frame > t:
                continue
            clip = Maps(*(torch.cat([m[:, frame, None], m[:, begin:end]], 1) for m in features))
            query = torch.tensor([[[0.0, y / scale[1], x / scale[0]]]])
            output = self.model.track(clip, query)
            position = output.tracks[0, 0, 1 + t - begin].numpy() * scale
            confidence = float(output.confidence[0, 0, 1 + t - begin])
            found[number] = ((x, y), 1.0) if frame == t else (position, confidence)
        return found


def assert_same(out, expected):
    assert out.ids.tolist() == list(expected)
    for number, xy, visible, confidence in zip(*out[1:], strict=True):
        np.testing.assert_allclose(xy, expected[number][0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(confidence, expected[number][1], rtol=1e-4, atol=1e-4)
        assert visible == (confidence >= 0.5 and (xy >= 0).all() and (xy <= (24, 20)).all())


places = st.tuples(st.floats(0, 24), st.floats(0, 20))
actions = st.one_of(
    st.tuples(st.just("frame"), st.integers(1, 6)),
    st.tuples(st.just("frame"), st.integers(1, 6)),
    st.tuples(st.just("lost"), st.just(1)),
    st.tuples(st.just("add"), st.lists(places, max_size=3), st.integers(0, 12)),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.just(("save",)),
    st.just(("wrong",)),
)


@hypothesis.settings(max_examples=50, derandomize=True, database=None, deadline=None)
@hypothesis.given(lookahead=st.integers(0, 5), script=st.lists(actions, min_size=5, max_size=30))
def test_any_stream_is_the_offline_run(lookahead, script):
    """Points come and go, frames get lost, the state is saved and loaded, wrong calls are made."""
    model = Swaying()
    make = lambda: PointTracker(model, device="cpu").stream(lookahead=lookahead, max_points=20)  # noqa: E731
    stream, oracle = make(), Oracle(model, lookahead)
    frames = itertools.cycle(video(60))
    for what, *how in script:
        if what in ("frame", "lost") and (what == "frame" or oracle.frames):
            for _ in range(how[0]):
                frame = next(frames) if what == "frame" else None
                oracle.frames.append(oracle.frames[-1] if frame is None else frame)
                out = stream.step(frame)
                t = len(oracle.frames) - 1 - lookahead
                assert (out is None) == (t < 0)
                if out is not None:
                    assert out.frame == t
                    assert_same(out, oracle.output(t))
        elif what == "add":
            points, back = how
            frame = max(stream.oldest_frame, stream.frames - back)
            sources = {point[0] for point in oracle.points.values()} | ({frame} if points else set())
            if len(oracle.points) + len(points) <= 20 and len(sources) <= 32:
                assert stream.add(np.reshape(points, (-1, 2)), frame=frame).tolist() == oracle.add(points, frame)
        elif what == "remove" and oracle.points:
            number = sorted(oracle.points)[how[0] % len(oracle.points)]
            stream.remove(number)
            del oracle.points[number]
        elif what == "save":
            file = io.BytesIO()
            torch.save(stream.state_dict(), file)
            file.seek(0)
            stream = make()
            stream.load_state_dict(torch.load(file, weights_only=True))
        elif what == "wrong":
            with pytest.raises(ValueError):
                stream.add([[np.nan, 1.0]])
            with pytest.raises(ValueError):
                stream.step(np.zeros((20, 24, 3), np.float32))
            with pytest.raises(ValueError):
                stream.remove([10_000])
    for out in stream.finish():
        assert_same(out, oracle.output(out.frame))


def test_a_matcher_gives_what_it_gives_offline():
    clip = square_clip(10)
    tracker = PointTracker(Matching(), device="cpu")
    whole = tracker(clip, queries=np.array([[0.0, 16.5, 32.5], [3.0, 28.5, 30.0]]))
    stream = tracker.stream(lookahead=2, max_points=2)
    stream.add([[16.5, 32.5]])
    outputs = []
    for t, frame in enumerate(clip):
        if t == 3:
            stream.add(torch.tensor([[28.5, 30.0]]))
        outputs.append(stream.step(torch.from_numpy(frame)))
    assert outputs[:2] == [None, None]
    outputs = outputs[2:] + stream.finish()
    assert [out.frame for out in outputs] == list(range(10))
    for t, out in enumerate(outputs):
        assert out.ids.tolist() == ([0] if t < 3 else [0, 1])
        np.testing.assert_allclose(out.xy, whole.tracks[out.ids, t], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out.confidence, whole.confidence[out.ids, t], atol=1e-5)
        assert out.visible.tolist() == whole.visibility[out.ids, t].tolist()


def test_a_tracker_with_adapters_gives_what_it_gives_offline():
    """With a lookahead of all windows and the clip's statistics; with the stream's own ones, something else."""
    model = tiny_chrono()
    tracker, clip = PointTracker(model, device="cpu"), video(15)
    queries = np.array([[0.0, 3.0, 4.0], [0.0, 20.0, 11.0], [5.0, 7.0, 8.0]])
    whole = tracker(clip, queries=queries)
    rasters = torch.from_numpy(np.stack([resized(frame, model.resolution) for frame in clip]))
    statistics = model.clip_statistics(rasters[None].float() / 127.5 - 1)

    def tracks(**options):
        stream = tracker.stream(**options)
        outputs = []
        for t, frame in enumerate(clip):
            stream.add(queries[queries[:, 0] == t, 1:])
            outputs.append(stream.step(frame))
        found = {out.frame: out for out in [*outputs, *stream.finish()] if out is not None}
        assert sorted(found) == list(range(15))
        return [found[t] for t in range(15)]

    for t, out in enumerate(tracks(lookahead=14, statistics=statistics)):
        np.testing.assert_allclose(out.xy, whole.tracks[: len(out.ids), t], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(out.confidence, whole.confidence[: len(out.ids), t], atol=1e-4)
    assert any(np.abs(out.xy - whole.tracks[: len(out.ids), out.frame]).max() > 1e-2 for out in tracks(lookahead=3))


class Causal(TAPIR):
    """Maps without the ResNet."""

    def features(self, video):
        maps = []
        for cell, channels in ((4, 128), (8, 256)):
            cells = F.avg_pool2d(video.flatten(0, 1).movedim(-1, 1), cell).movedim(1, -1)
            mixed = cells @ torch.sin(torch.arange(3.0 * channels)).view(3, channels)
            maps.append(F.normalize(mixed, dim=-1).unflatten(0, video.shape[:2]))
        return TAPIRFeatures(*maps)


@torch.no_grad()
def test_a_causal_tapir_carries_its_state():
    torch.manual_seed(0)
    model, clip = Causal(causal=True).eval(), video(6, seed=1)
    stream = PointTracker(model, device="cpu").stream(lookahead=1)
    rasters = torch.from_numpy(np.stack([resized(frame, model.resolution) for frame in clip]))
    features = [model.features(raster[None, None].float() / 127.5 - 1) for raster in rasters]
    given = {0: [[3.0, 4.0], [20.0, 11.0]], 2: [[7.0, 8.0]]}
    expected = {t: {} for t in range(6)}
    for number, (start, x, y) in enumerate((t, *point) for t, points in given.items() for point in points):
        place = torch.tensor([[[0.0, y * 256 / 20, x * 256 / 24]]])
        query, state = model.query_features(features[start], place), model.initial_state(1, 1)
        for t in range(start, 6):
            output, state = model.step(features[t], query, state)
            position = output.tracks[0, 0, 0].numpy() * [24 / 256, 20 / 256]
            expected[t][number] = ((x, y), 1.0) if t == start else (position, float(output.confidence[0, 0, 0]))
    outputs = []
    for t, frame in enumerate(clip):
        stream.add(np.reshape(given.get(t, []), (-1, 2)))
        outputs.append(stream.step(frame))
        if t == 3:
            saved, stream = stream.state_dict(), PointTracker(model, device="cpu").stream(lookahead=1)
            stream.load_state_dict(saved)
    for out in [*outputs[1:], *stream.finish()]:
        assert_same(out, expected[out.frame])


def test_descriptors_find_points_in_another_video():
    tracker, clip = PointTracker(Matching(), device="cpu"), square_clip(6)
    first = tracker.stream(lookahead=0)
    ids = first.add([[16.0, 32.0], [2.0, 2.0]])
    with pytest.raises(ValueError, match="features of the frame of point 0 are not complete yet"):
        first.descriptors(ids)
    first.step(clip[0])
    file = io.BytesIO()
    torch.save(first.descriptors(ids[:1]), file)
    file.seek(0)
    second = tracker.stream(lookahead=0)
    (found,) = second.add(descriptors=torch.load(file, weights_only=True))
    out = second.step(clip[5])
    assert out.ids.tolist() == [found] and out.visible.all()
    np.testing.assert_allclose(out.xy, [[36, 32]], atol=3)
    other = PointTracker(Swaying(), device="cpu").stream()
    with pytest.raises(ValueError, match="descriptors must be what `descriptors` returned of a stream of Swaying"):
        other.add(descriptors=first.descriptors(ids))


def refusals(stream, frame):
    yield lambda: stream.add([[25.0, 1.0]]), r"point 1 of 1 \(x=25, y=1\) is outside the frame: x must be 0 to 24 and y"
    yield lambda: stream.add([[1.0, 2.0], [np.nan, 1.0]]), r"point 2 of 2 \(x=nan, y=1\) is outside"
    yield lambda: stream.add([1.0, 2.0]), r"points must be \[n, 2\] with rows x, y, got shape \[2\]"
    yield lambda: stream.add(np.ones((4, 2))), "4 more points than the 1 there are would be more than max_points=4"
    yield (
        lambda: stream.add([[1.0, 1.0]], frame=40),
        "frame must be from 9, the oldest that is still here, to 20",
    )
    yield lambda: stream.add([[1.0, 1.0]], frame=8), "frame must be from 9"
    yield lambda: stream.add(), "give either points or descriptors"
    yield lambda: stream.add(descriptors={}), "descriptors must be what"
    yield lambda: stream.add(descriptors=stream.descriptors([0]), frame=3), "frame goes with points"
    yield lambda: stream.remove([0, 7]), "ids: no point has the id 7"
    yield lambda: stream.descriptors([7]), "ids: no point has the id 7"
    yield lambda: stream.step(frame[:-1]), "frame must be 24x20 as the first one, got 24x19"
    yield lambda: stream.step(frame / 255), r"frame must be uint8 RGB \[H, W, 3\], got float64 of shape \[20, 24, 3\]"
    yield lambda: stream.load_state_dict({}), "saved must be what state_dict returned"
    yield (
        lambda: stream.load_state_dict(PointTracker(Swaying()).stream(lookahead=1).state_dict()),
        "saved is the state of a stream with .*'lookahead': 1",
    )


def test_what_a_stream_refuses_leaves_it_as_it_was():
    frames = video(21)
    stream = PointTracker(Swaying(), device="cpu").stream(lookahead=2, max_points=4)
    with pytest.raises(ValueError, match="frame is None, which stands for the frame before it, and there is none"):
        stream.step(None)
    stream.add([[3.0, 4.0]])
    for frame in frames[:20]:
        stream.step(frame)
    twin = PointTracker(Swaying(), device="cpu").stream(lookahead=2, max_points=4)
    twin.load_state_dict(stream.state_dict())
    for call, message in refusals(stream, frames[20]):
        with pytest.raises(ValueError, match=message):
            call()
    for x, y in zip(stream.step(frames[20]), twin.step(frames[20]), strict=True):
        np.testing.assert_array_equal(x, y)
    stream.finish()
    for call in (lambda: stream.step(frames[0]), stream.finish, lambda: stream.add([[1.0, 1.0]])):
        with pytest.raises(ValueError, match="the stream has ended: make a new one"):
            call()


def test_a_point_outside_the_first_frame_is_an_error_of_that_frame():
    stream = PointTracker(Swaying(), device="cpu").stream(lookahead=0)
    ids = stream.add([[30.0, 1.0]])
    with pytest.raises(ValueError, match="x=30, y=1"):
        stream.step(video(1)[0])
    stream.remove(ids)
    assert stream.step(video(1)[0]).frame == 0


def test_points_of_too_many_frames():
    stream = PointTracker(Swaying(), device="cpu").stream(lookahead=0, max_sources=2)
    for frame in video(2):
        stream.add([[1.0, 1.0]])
        stream.step(frame)
    with pytest.raises(ValueError, match="would come from 3 frames, whose features are kept, more than max_sources=2"):
        stream.add([[1.0, 1.0]])
    stream.remove(0)
    assert stream.add([[1.0, 1.0]]).tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lookahead=-1), "lookahead must be a whole number of 0 or more, got -1"),
        (dict(lookahead=1.5), "lookahead must be a whole number"),
        (dict(max_points=0), "max_points must be a whole number of 1 or more"),
        (dict(min_confidence=2), "min_confidence must be 0 to 1, got 2"),
        (dict(statistics=[]), "statistics are those of temporal adapters, which Swaying does not have"),
    ],
)
def test_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        PointTracker(Swaying(), device="cpu").stream(**arguments)


def test_models_that_need_the_whole_clip():
    with pytest.raises(ValueError, match="ColourTracker cannot run frame by frame: a stream needs nano"):
        PointTracker(ColourTracker(), device="cpu").stream()
    with pytest.raises(ValueError, match="function cannot run frame by frame"):
        PointTracker(lambda video, queries: None, device="cpu").stream()


@pytest.mark.slow
def test_memory_stays_flat():
    """Within 2 % from frame 300 to 900; docs/tracking.md has the curve to frame 10,000."""
    script = Path(__file__).parents[1] / "benchmarks" / "stream_memory.py"
    done = subprocess.run([sys.executable, script, "300", "900", "50"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sizes = np.array(done.stdout.split()[1::3], dtype=float)
    # The allocator adds and returns a few MB at any time: the means of both halves are compared.
    assert len(sizes) == 13 and sizes[7:].mean() < 1.02 * sizes[:6].mean()
