"""Scores by motion and reappearance against a loop over the tracks."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tritonkern.cli import app
from tritonkern.models.matching import TrackerOutput
from tritonkern.tracking.baselines import StandingStill
from tritonkern.tracking.bins import mean_step, reappearances
from tritonkern.tracking.evaluation import evaluate, save_scores
from tritonkern.tracking.metrics import tapvid_metrics
from tritonkern.tracking.tapvid import TapVidClip, tapvid_queries


class Straight(StandingStill):
    """Half a pixel to the right per frame, and hidden in every fourth frame."""

    resolution = (128, 64)  # frames are resized

    def track(self, features, queries):
        output = super().track(features, queries)
        frames = torch.arange(features.shape[1])
        tracks = output.tracks + frames[:, None] * torch.tensor([0.5, 0.0])
        return TrackerOutput(tracks, torch.where(frames % 4 == 3, 9.0, -9.0).expand_as(output.occlusion), output[2])


def clips():
    rng = np.random.default_rng(0)
    for number, (tracks, frames) in enumerate([(30, 12), (20, 7)]):
        speed = rng.choice([0.3, 3.0, 10.0, 30.0], tracks)[:, None, None]
        points = 128 + (speed * rng.normal(size=(tracks, frames, 2))).cumsum(1)
        occluded = rng.random((tracks, frames)) < rng.choice([0, 0.2, 0.6], tracks)[:, None]
        points[occluded] = np.nan
        yield TapVidClip(str(number), np.zeros((frames, 256, 256, 3), np.uint8), points, occluded)


def loop(model, mode):
    """Every track by itself, one frame after the other."""
    bins = {"motion": [[] for _ in range(4)], "reappearance": [[] for _ in range(3)]}
    for clip in clips():
        queries, tracks = tapvid_queries(clip, mode)
        video = torch.zeros(1, len(clip.video), *model.resolution, 3)
        scale = torch.tensor([1, *(size / 256 for size in model.resolution)])
        output = model.track(model.features(video), torch.from_numpy(queries).float()[None] * scale)
        found = output.tracks[0].numpy() / scale[1:].flip(0).numpy()
        hidden = ~output.visible[0].numpy() | (found < 0).any(-1) | (found > 256).any(-1)
        for row, track in enumerate(tracks):
            steps, back = [], 0
            for before, after in zip(range(len(clip.video) - 1), range(1, len(clip.video)), strict=True):
                if not clip.occluded[track, before] and not clip.occluded[track, after]:
                    steps.append(math.dist(clip.points[track, before], clip.points[track, after]))
                back += clip.occluded[track, before] and not clip.occluded[track, after]
            step = (sum(steps) / len(steps) if steps else 0) / math.sqrt(2 * 256**2)
            one = slice(row, row + 1)
            scores = tapvid_metrics(
                queries[one, 0], clip.occluded[[track]], clip.points[[track]], hidden[one], found[one], mode,
            )  # fmt: skip
            bins["motion"][0 if step < 0.005 else 1 if step < 0.015 else 2 if step < 0.05 else 3].append(scores)
            bins["reappearance"][0 if back == 0 else 1 if back <= 2 else 2].append(scores)
    return bins


@pytest.mark.parametrize("mode", ["first", "strided"])
def test_bins_are_those_of_a_loop(mode):
    model = Straight()
    found = evaluate(model, clips(), mode, bins=True)[mode].bins
    expected = loop(model, mode)
    assert found.keys() == expected.keys()
    for kind, rows in found.items():
        assert len(rows) == len(expected[kind])
        for row, scores in zip(rows.values(), expected[kind], strict=True):
            assert row["tracks"] == len(scores) > 0
            for name in ("delta_avg", "AJ", "OA"):
                assert row[name] == pytest.approx(np.nanmean([score[name] for score in scores]), abs=1e-4)
    assert evaluate(model, clips(), mode)[mode].bins == {}


def test_limits_and_tracks_that_are_never_seen():
    points = np.zeros((3, 3, 2))
    points[0, :, 0] = [0, 3, 6]
    points[1, :, 0] = [0, 5, 100]
    occluded = np.array([[False] * 3, [False, False, True], [True, True, False]])
    assert mean_step(points, occluded, (3, 4)).tolist() == [3 / 5, 1, 0]
    assert reappearances(occluded).tolist() == [0, 0, 1]


@pytest.mark.slow
def test_command_line(tmp_path):
    clip = next(clips())
    path, out = tmp_path / "davis.pkl", tmp_path / "scores.json"
    video = {"video": clip.video, "points": clip.points / 256, "occluded": clip.occluded}
    path.write_bytes(pickle.dumps({"one": video}))
    options = ["--mode", "first", "--bins", "--out", str(out)]
    result = CliRunner().invoke(app, ["eval", "--tapvid", str(path), *options])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert "by motion" in words and "standing still first 0.005 to 0.015" in words and "1 or 2" in words
    saved = json.loads(out.read_text())["davis.pkl"]["standing still"]["first"]
    assert sum(row["tracks"] for row in saved["motion"].values()) == 30
    assert sum(row["tracks"] for row in saved["reappearance"].values()) == 30


def test_empty_bins_are_null(tmp_path):
    still = TapVidClip("still", np.zeros((4, 256, 256, 3), np.uint8), np.full((2, 4, 2), 9.0), np.zeros((2, 4), bool))
    save_scores(tmp_path / "scores.json", {"set": {"model": evaluate(StandingStill(), [still], "first", bins=True)}})
    saved = json.loads((tmp_path / "scores.json").read_text())["set"]["model"]["first"]
    assert saved["motion"]["below 0.005"] == {"tracks": 2, "delta_avg": 100, "AJ": 100, "OA": 100}
    assert saved["motion"]["0.05 and above"] == {"tracks": 0, "delta_avg": None, "AJ": None, "OA": None}
