"""`evaluate` with trackers whose scores can be worked out by hand."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import tritonkern.training
from tritonkern import tracking
from tritonkern.cli import app
from tritonkern.models import ChronoNano
from tritonkern.models.matching import MatchingTracker, TrackerOutput
from tritonkern.tracking.baselines import StandingStill
from tritonkern.tracking.evaluation import evaluate, save_scores
from tritonkern.tracking.tapvid import TapVidClip

FRAMES = 6


def clip(name="moving", speed=3.0, hidden=()):
    """Two points: one stands still at (100, 50), one starts at (20, 30) and moves `speed` px a frame to the right."""
    points = np.zeros((2, FRAMES, 2))
    points[0] = 100, 50
    points[1] = 20, 30
    points[1, :, 0] += speed * np.arange(FRAMES)
    occluded = np.zeros((2, FRAMES), dtype=bool)
    for track, frame in hidden:
        occluded[track, frame] = True
    video = np.zeros((FRAMES, 256, 256, 3), dtype=np.uint8)
    video[1:] = 255
    return TapVidClip(name, video, points, occluded)


class Recorder(MatchingTracker):
    """Standing still, and remembering what it was given."""

    resolution = (256, 256)

    def __init__(self, occlusion=-9.0, expected_distance=-9.0):
        super().__init__()
        self.logits = occlusion, expected_distance
        self.videos, self.queries = [], []

    def features(self, video):
        assert torch.is_inference_mode_enabled() and not self.training
        self.videos.append(video)
        return video[..., :1]

    def track(self, features, queries):
        self.queries.append(queries)
        tracks = queries[:, :, None, [2, 1]].repeat(1, 1, features.shape[1], 1)
        occlusion, expected_distance = (torch.full(tracks.shape[:3], logit) for logit in self.logits)
        return TrackerOutput(tracks, occlusion, expected_distance)


def test_evaluation_is_part_of_the_tracking_package():
    names = {"evaluate", "read_tapvid", "TapVidClip", "tapvid_metrics"}
    assert names <= set(tracking.__all__) and all(hasattr(tracking, name) for name in names)


def test_standing_still_by_hand_first():
    # Asked at frame 0, evaluated at frames 1 to 5, all visible. The still point is always right; the moving one is
    # 3, 6, 9, 12, 15 px off, so it is right in 0, 0, 1, 2, 5 of 5 frames for x = 1, 2, 4, 8, 16.
    # delta_x = (5 + that) / 10: 50, 50, 60, 70, 100                          -> 66
    # jaccard_x: a miss is also a false positive: c / (10 + 10 - c) for c = 5, 5, 6, 7, 10.
    first = evaluate(StandingStill(), [clip()], "first")["first"]
    jaccard = [5 / 15, 5 / 15, 6 / 14, 7 / 13, 1]
    assert first.mode == "first"
    assert first.mean["delta_avg"] == pytest.approx(66)
    assert first.mean["AJ"] == pytest.approx(20 * sum(jaccard))
    assert first.mean["OA"] == 100


def test_standing_still_by_hand_strided():
    # Asked at frames 0 and 5, so that the moving point is asked twice, with the same five distances either way.
    result = evaluate(StandingStill(), [clip()])
    assert result.keys() == {"first", "strided"}
    assert result["strided"].mean == pytest.approx(result["first"].mean)


def test_standing_still_with_an_occlusion():
    # The moving point hides at frame 3 (9 px off): 9 visible pairs, of which it has 3, 6, 12, 15 px.
    # correct: 5 + (0, 0, 1, 2, 4) of 9; false positives: all 10 pairs are predicted visible, 10 - correct.
    # jaccard: c / (9 + 10 - c); OA: 9 of 10.
    mean = evaluate(StandingStill(), [clip(hidden=[(1, 3)])], "first")["first"].mean
    correct = np.array([5, 5, 6, 7, 9])
    assert mean["delta_avg"] == pytest.approx(100 * (correct / 9).mean())
    assert mean["AJ"] == pytest.approx(100 * (correct / (19 - correct)).mean())
    assert mean["OA"] == pytest.approx(90)


def test_scores_of_videos_and_their_mean():
    # A clip that does not move scores 100, the other 66; a clip with nothing visible has no score and no weight.
    nothing = clip("dark", hidden=[(n, t) for n in range(2) for t in range(FRAMES)])
    result = evaluate(StandingStill(), iter([clip("still", speed=0), clip(), nothing]), "first")["first"]
    assert [name for name, _ in result.videos] == ["still", "moving", "dark"]
    assert [scores["delta_avg"] for _, scores in result.videos] == pytest.approx([100, 66, np.nan], nan_ok=True)
    assert result.mean["delta_avg"] == pytest.approx(83)


def test_what_the_model_is_given():
    model = Recorder()
    steps = []
    evaluate(model, [clip("a"), clip("b")], progress=lambda *step: steps.append(step))
    assert steps == [("evaluating", 1, 2), ("evaluating", 2, 2)]
    assert model.training
    # Features once a clip, queries once a mode.
    assert len(model.videos) == 2 and len(model.queries) == 4
    video = model.videos[0]
    assert video.shape == (1, FRAMES, 256, 256, 3) and video.dtype == torch.float32
    assert (video[0, 0] == -1).all() and (video[0, 1:] == 1).all()
    first, strided = model.queries[:2]
    assert first.dtype == torch.float32
    assert first.tolist() == [[[0, 50, 100], [0, 30, 20]]]
    assert strided.tolist() == [[[0, 50, 100], [0, 30, 20], [5, 50, 100], [5, 30, 35]]]


@pytest.mark.parametrize(
    "occlusion, expected_distance, visible",
    # sigmoid(0) = 1/2, so that (1 - 1/2)(1 - 0) = 1/2 is still visible, and (1 - 1/2)(1 - 1/2) is not.
    [(-9, -9, True), (0, -torch.inf, True), (0, 0, False), (-9, 9, False), (9, -9, False)],
)
def test_visibility_joins_both_logits(occlusion, expected_distance, visible):
    mean = evaluate(Recorder(occlusion, expected_distance), [clip()], "first")["first"].mean
    assert mean["OA"] == (100 if visible else 0)
    assert mean["delta_avg"] == pytest.approx(66)


def test_a_real_matching_tracker_finds_a_bright_square():
    class Brightness(MatchingTracker):
        """Features that tell positions apart only by their colour, averaged over 8x8 cells."""

        resolution = (256, 256)

        def features(self, video):
            cells = video.unflatten(2, (32, 8)).unflatten(4, (32, 8)).mean((3, 5))
            return torch.nn.functional.normalize(cells, dim=-1)

    # The cell from 8k to 8k + 8 is red and moves one cell a frame over a blue ground; its centre is tracked.
    centre = np.array([[20 + 8 * t, 60] for t in range(FRAMES)], dtype=float)
    video = np.zeros((FRAMES, 256, 256, 3), dtype=np.uint8)
    video[..., 2] = 255
    for t, (x, y) in enumerate(centre.astype(int)):
        video[t, y - 4 : y + 4, x - 4 : x + 4] = 255, 0, 0
    moving = TapVidClip("square", video, centre[None], np.zeros((1, FRAMES), dtype=bool))
    model = Brightness()
    # A sharp softmax, so that the neighbouring cells (cosine -1/3 against 1) weigh nothing.
    model.temperature = 100.0
    result = evaluate(model, [moving])
    assert result["first"].mean["delta_avg"] == result["strided"].mean["delta_avg"] == 100
    assert evaluate(StandingStill(), [moving], "first")["first"].mean["delta_avg"] < 20


def test_same_scores_every_time():
    assert evaluate(StandingStill(), [clip()]) == evaluate(StandingStill(), [clip()])


def test_the_training_flag_comes_back_after_an_error():
    model = Recorder()
    model.track = None
    with pytest.raises(TypeError):
        evaluate(model, [clip()])
    assert model.training


def test_a_model_of_another_resolution():
    model = Recorder()
    model.resolution = (64, 512)
    result = evaluate(model, [clip()], "first")["first"]
    assert model.videos[0].shape == (1, FRAMES, 64, 512, 3)
    assert model.queries[0].tolist() == [[[0, 12.5, 200], [0, 7.5, 40]]]
    assert result == evaluate(Recorder(), [clip()], "first")["first"]


def test_a_stream_of_clips_has_no_total():
    steps = []
    evaluate(StandingStill(), iter([clip()]), progress=lambda *step: steps.append(step))
    assert steps == [("evaluating", 1, None)]


def test_saved_scores_are_strict_json(tmp_path):
    nothing = clip("dark", hidden=[(n, t) for n in range(2) for t in range(FRAMES)])
    scores = {"clips": {"standing still": evaluate(StandingStill(), [clip(), nothing], "first")}}
    save_scores(tmp_path / "scores.json", scores)

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "scores.json").read_text(), parse_constant=no_constant)
    saved = content["clips"]["standing still"]["first"]
    assert saved["mean"] == scores["clips"]["standing still"]["first"].mean
    assert [(row["name"], row["delta_avg"]) for row in saved["videos"]] == [
        ("moving", pytest.approx(66)),
        ("dark", None),
    ]


UNTRAINED = ("--model", "chrono-nano", "--weights")


@pytest.fixture
def checkpoint(tmp_path):
    """Untrained weights of chrono-nano: the command line must work before any training."""
    torch.manual_seed(0)
    path = tmp_path / "untrained.safetensors"
    save_file(ChronoNano().state_dict(), path)
    return path


@pytest.fixture
def davis(tmp_path):
    """One video of six frames in the layout of TAP-Vid-DAVIS."""
    source = clip()
    path = tmp_path / "davis.pkl"
    video = {"video": source.video, "points": source.points / 256, "occluded": source.occluded}
    path.write_bytes(pickle.dumps({"moving": video}))
    return path


@pytest.mark.slow
def test_command_line_on_a_tapvid_file(davis, checkpoint, tmp_path):
    out = tmp_path / "new" / "scores.json"
    result = CliRunner().invoke(app, ["eval", *UNTRAINED, str(checkpoint), "--tapvid", str(davis), "--out", str(out)])
    assert result.exit_code == 0, result.output
    saved = json.loads(out.read_text())["davis.pkl"]
    others = {"standing still", "Lucas-Kanade", "DIS flow", "chrono-nano, cycle closed", "DIS flow, then chrono-nano"}
    assert saved.keys() == {"chrono-nano", *others}
    columns = *(f"delta_{x}" for x in (1, 2, 4, 8, 16)), "delta_avg", "AJ", "OA"
    words = " ".join(result.stdout.split())
    for tracker, modes in saved.items():
        assert modes.keys() == {"first", "strided"}
        for mode, evaluation in modes.items():
            assert " ".join([tracker, mode, *(f"{evaluation['mean'][name]:.1f}" for name in columns)]) in words
            assert evaluation["seconds_per_frame"] > 0 and evaluation["peak_memory"] > 100


@pytest.mark.slow
def test_command_line_on_generated_clips(checkpoint, monkeypatch):
    sets = {"one": lambda: iter([clip()]), "still": lambda: iter([clip(speed=0)])}
    monkeypatch.setattr(tritonkern.training, "SETS", sets)
    result = CliRunner().invoke(app, ["eval", *UNTRAINED, str(checkpoint), "--synthetic", "--mode", "first"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    moving, still = "50.0 50.0 60.0 70.0 100.0 66.0", "100.0 100.0 100.0 100.0 100.0 100.0"
    for part in ("one tracker", f"standing still first {moving}", "still tracker", f"standing still first {still}"):
        assert part in words


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either --tapvid PATH or --synthetic"),
        (["--tapvid", "nowhere.pkl", "--synthetic"], "give either --tapvid PATH or --synthetic"),
        (["--tapvid", "nowhere.pkl"], "nowhere.pkl: no such file"),
        (["--tapvid", "{davis}", "--mode", "last"], "mode must be"),
        (["--synthetic", "--mode", "last"], "mode must be"),
        (["--tapvid", "{davis}", "--model", "nope"], "no model is called 'nope'"),
        (["--tapvid", "{davis}", "--out", "{davis}/scores.json"], "exists"),
    ],
)
def test_command_line_errors_are_one_line(davis, checkpoint, arguments, message):
    arguments = [argument.format(davis=davis) for argument in arguments]
    result = CliRunner().invoke(app, ["eval", *UNTRAINED, str(checkpoint), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and "\n" not in result.stderr.strip()


def test_a_hostile_pickle_is_one_line_too(tmp_path, checkpoint):
    class Hostile:
        def __reduce__(self):
            return print, ("ran",)

    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(Hostile()))
    result = CliRunner().invoke(app, ["eval", *UNTRAINED, str(checkpoint), "--tapvid", str(path)])
    assert result.exit_code == 2
    assert "asks for builtins.print" in result.stderr and "ran" not in result.stdout


def test_bad_arguments():
    with pytest.raises(ValueError, match='mode must be "first", "strided" or "both"'):
        evaluate(StandingStill(), [clip()], "last")
    with pytest.raises(ValueError, match="dataset holds no clip"):
        evaluate(StandingStill(), [])
