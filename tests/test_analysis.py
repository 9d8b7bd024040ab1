"""Metrics of matching by layer and noise: by hand, against dense attention, and from the command line."""

import csv
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from tritonkern.cli import app
from tritonkern.models import CogVideoX, DiffTrack, DiffTrackNano, Preset
from tritonkern.models.difftrack_nano import StraightPath
from tritonkern.tracking.analysis import METRICS, analyse, timestep_of
from tritonkern.tracking.matching_scores import attention_scores, harmonic_mean, matching_accuracy, tracks_of_latents
from tritonkern.tracking.tapvid import TapVidClip
from tritonkern.tracking.track_folder import read_track_folder


def test_accuracy():
    points = np.zeros((2, 4, 2))
    tracks = points + np.array([[0, 0], [0, 4.2], [2.9, 0], [2.8, 0]])  # of 256: 8 of 480 x 720 is 2.84 and 4.27
    visible = np.ones((2, 4), dtype=bool)
    visible[1] = [True, True, False, True]
    assert matching_accuracy(tracks, points, visible, (256, 256)) == pytest.approx(100 * 6 / 7)
    assert math.isnan(matching_accuracy(tracks, points, visible & False, (256, 256)))


def test_latents_to_frames():
    rng = np.random.default_rng(0)
    tracks = rng.normal(size=(3, 13, 2))
    published = F.interpolate(torch.from_numpy(tracks).permute(0, 2, 1), size=49, mode="linear", align_corners=False)
    np.testing.assert_allclose(tracks_of_latents(tracks, 49, official=True), published.permute(0, 2, 1), atol=1e-12)
    assert tracks_of_latents(tracks, 13) is tracks
    # The mean of four frames of an even motion is its position in their middle, so that nothing is lost.
    moving = np.stack([3.0 * np.arange(49), -np.arange(49.0)], -1)[None]
    latents = np.concatenate([moving[:, :1], moving[:, 1:].reshape(1, 12, 4, 2).mean(2)], 1)
    np.testing.assert_allclose(tracks_of_latents(latents, 49)[:, :47], moving[:, :47], atol=1e-12)
    assert np.abs(tracks_of_latents(latents, 49, official=True)[:, :47] - moving[:, :47]).max() > 1


@pytest.mark.parametrize("official", [False, True])
def test_attention_scores_by_hand(official):
    rng = np.random.default_rng(1)
    maximum, total = rng.random((5, 5)), rng.random((5, 5))  # text, and 4 latents of 1 + 3 x 2 frames
    visible = rng.random((5, 7)) < 0.7
    visible[0], visible[1, 0], visible[2] = False, False, True
    confidence, attention = np.zeros((0, 3)), np.zeros((0, 3))
    for m, s, v in zip(maximum, total, visible, strict=True):
        seen = [m[2 + k] for k in range(3) if v[1 + 2 * k] and v[2 + 2 * k]]
        cross = np.mean(seen) if seen else (0 if official else math.nan)
        if official or v[0]:
            confidence = np.vstack([confidence, [m[0], m[1], cross]])
        if v[0]:
            attention = np.vstack([attention, [s[0], s[1], s[2:].sum()]])
    expected = [*np.nanmean(confidence, 0), *attention.mean(0)]
    np.testing.assert_allclose(attention_scores(maximum, total, visible, official), expected)


def test_harmonic_mean():
    tables = [
        np.array([[1.0, 3.0], [2.0, 5.0]]),
        np.array([[0.0, 4.0], [2.0, 2.0]]),
        np.array([[7.0, 8.0], [8.0, 9.0]]),
    ]
    expected = [[0, 3 / (1 / 0.5 + 1 / 1 + 1 / 0.5)], [3 / (1 / 0.25 + 1 / 0.5 + 1 / 0.5), 3 / (1 + 1 / 0.5 + 1)]]
    np.testing.assert_allclose(harmonic_mean(tables), expected)
    assert not harmonic_mean([np.ones((1, 1))] * 3).any()


def tiny():
    """A model of pixels of 32 x 48 in cells of 8, whose keys are its queries."""
    torch.manual_seed(0)
    transformer = CogVideoX(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        time_embed_dim=16,
        text_embed_dim=8,
        num_layers=2,
        sample_width=48,
        sample_height=32,
        sample_frames=13,
        patch_size=8,
        max_text_seq_length=3,
    )
    for block in transformer.transformer_blocks:
        block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())
    preset, prompt = Preset((1,), (19.0,), None, 4), torch.randn(1, 3, 8)
    return DiffTrack(
        transformer, preset=preset, scheduler=StraightPath(), resolution=(32, 48), prompt=prompt, radius=None
    ).eval()


def moving_clip():
    """Cells that move by one cell a frame to the right; points at their centres, some never visible."""
    rng = np.random.default_rng(0)
    first = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    first ^= rng.integers(0, 64, first.shape, dtype=np.uint8)
    video = np.stack([np.roll(first, 8 * t, 1) for t in range(4)])
    rows, columns = np.divmod(np.arange(24), 6)
    x = (columns[:, None] + np.arange(4)) * 8 + 4.0
    points = np.stack([x, np.broadcast_to(rows[:, None] * 8 + 4.0, x.shape)], -1)
    occluded = x >= 48
    occluded[::5] = True
    return TapVidClip("moving", video, points, occluded)


class Attention(TorchFunctionMode):
    """Queries, keys and results of every attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.scaled_dot_product_attention:
            self.seen.append((*args[:2], result))
        return result


@pytest.mark.parametrize("official", [False, True])
def test_against_dense_attention(official):
    model, clip = tiny(), moving_clip()
    with Attention() as attention:
        result = analyse(model, [clip], steps=[49, 10], official=official)
    assert result.values.shape == (1, 2, 2, len(METRICS)) and result.steps == [49, 10]
    visible = ~clip.occluded
    kept = np.ones(24, dtype=bool) if official else visible[:, 0]
    x, y = (clip.points[kept, 0] / 8).T
    # The published code takes x for the row, rounded instead of cut off.
    row, column = (np.round(x).clip(0, 3), np.round(y).clip(0, 5)) if official else (y // 1, x // 1)
    cells = (row * 6 + column).astype(int)
    for number, (query, key, output) in enumerate(attention.seen):
        step, layer = divmod(number, 2)
        values = dict(zip(METRICS, result.values[0, layer, step], strict=True))
        weights = (query @ key.mT / 4).softmax(-1)[0].mean(0)[3 + cells].double().numpy()
        frames = weights[:, 3:].reshape(len(cells), 4, 24)
        maximum = np.column_stack([weights[:, :3].max(1), frames.max(2)])
        total = np.column_stack([weights[:, :3].sum(1), frames.sum(2)])
        expected = attention_scores(maximum, total, visible[kept], official)
        np.testing.assert_allclose([*values.values()][2:], expected, atol=1e-6 + 6e-5 * official)
        parts = [output.transpose(1, 2).flatten(2)[0, 3:].reshape(4, 24, -1)]
        feature = parts[0]
        best = torch.stack([(feature[0] @ frame.mT).argmax(-1) for frame in feature])  # [T, S]
        if not official:
            # Points at the centres of cells: no position between cells, so that the match is all that counts.
            mine = (clip.points[kept, 0] // 8) @ [1, 6]
            found = best[:, mine.astype(int)].numpy().T
            hit = (found % 6 == clip.points[kept, :, 0] // 8) & (found // 6 == clip.points[kept, :, 1] // 8)
            hit[:, 0] = True
            assert values["feature_accuracy"] == pytest.approx(100 * hit[visible[kept]].mean())
    assert len(attention.seen) == 4
    if not official:
        low = result.values[0, :, 0, 0]
        assert low.max() > 90 > result.values[0, :, 1, 0].max() - 1e-9


def test_noise_depends_on_step_and_clip_only():
    model, clip = tiny(), moving_clip()
    whole = analyse(model, [clip, clip], steps=[5, 30])
    assert not np.array_equal(whole.values[0], whole.values[1])
    part = analyse(model, [clip], layers=[1], steps=[30])
    np.testing.assert_array_equal(part.values[0, 0, 0], whole.values[0, 1, 1])
    with pytest.raises(ValueError, match=r"layers must be some from 0 to 1, got \[2\]"):
        analyse(model, [clip], layers=[2])
    with pytest.raises(ValueError, match=r"steps must be some from 0 to 49, got \[50\]"):
        analyse(model, [clip], steps=[50])
    with pytest.raises(ValueError, match="clips: there is none"):
        analyse(model, [])
    model.scheduler = None
    with pytest.raises(ValueError, match="model has no scheduler"):
        analyse(model, [clip])


def test_timesteps():
    assert [timestep_of(step) for step in (0, 1, 49)] == [999, 979, 19]


def folder_of(path, frames=4, stored=4):
    clip = moving_clip()
    for name in ("tracks", "visibility", "videos"):
        (path / name).mkdir(parents=True)
    np.save(path / "tracks/007.npy", clip.points[:, :frames].transpose(1, 0, 2)[None].astype(np.float32))
    np.save(path / "visibility/007.npy", ~clip.occluded[:, :frames].T[None])
    first, *rest = (Image.fromarray(frame) for frame in clip.video[:stored])
    first.save(path / "videos/007.png", save_all=True, append_images=rest)
    return clip


def test_folder(tmp_path):
    clip = folder_of(tmp_path)
    (read,) = read_track_folder(tmp_path)
    assert read.name == "007" and np.array_equal(read.video, clip.video) and np.array_equal(read.points, clip.points)
    assert np.array_equal(read.occluded, clip.occluded)
    np.save(tmp_path / "visibility/007.npy", np.ones((1, 3, 24), dtype=bool))
    with pytest.raises(ValueError, match=r"visibility of .*007.npy must be bool \[1, 4, 24\], got bool \[3, 24\]"):
        list(read_track_folder(tmp_path))
    (tmp_path / "visibility/007.npy").unlink()
    with pytest.raises(FileNotFoundError, match="visibility/007.npy does not exist"):
        list(read_track_folder(tmp_path))
    (tmp_path / "tracks/007.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="tracks/007.npy is no readable NumPy file"):
        list(read_track_folder(tmp_path))


def test_folder_without_its_videos(tmp_path):
    folder_of(tmp_path, stored=2)
    with pytest.raises(ValueError, match=r"007.png must have 4 frames for .*007.npy, got 2"):
        list(read_track_folder(tmp_path))
    (tmp_path / "videos/007.png").unlink()
    with pytest.raises(FileNotFoundError, match="holds no video 007"):
        list(read_track_folder(tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no tracks/NNN.npy"):
        list(read_track_folder(tmp_path / "videos"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "nano.safetensors"
    torch.manual_seed(0)
    save_file(DiffTrackNano().transformer.state_dict(), path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["analyse", *map(str, arguments)])


def test_command(tmp_path, weights):
    pytest.importorskip("matplotlib")
    folder_of(tmp_path / "data")
    out = tmp_path / "out"
    result = run("--weights", weights, "--folder", tmp_path / "data", "--out", out, "--layers", "1", "--steps", "49,9")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["clips.csv", "heat-map.png", "mean.csv"]
    with open(out / "mean.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["step"], row["timestep"]) for row in rows] == [("1", "49", "19"), ("1", "9", "819")]
    assert all(0 <= float(row[name]) <= 100 for row in rows for name in METRICS)
    with open(out / "clips.csv") as file:
        assert [row["clip"] for row in csv.DictReader(file)] == ["007", "007"]
    assert Image.open(out / "heat-map.png").size[0] > 500


def test_command_on_tapvid(tmp_path, weights):
    pytest.importorskip("matplotlib")
    clip = moving_clip()
    example = dict(video=clip.video, points=clip.points / [48, 32], occluded=clip.occluded)
    (tmp_path / "clips.pkl").write_bytes(pickle.dumps({"one": example, "two": example}))
    options = "--weights", weights, "--tapvid", tmp_path / "clips.pkl", "--layers", "0", "--steps", "49"
    assert run(*options, "--out", tmp_path / "out", "--official").exit_code == 0
    with open(tmp_path / "out/clips.csv") as file:
        assert [row["clip"] for row in csv.DictReader(file)] == ["one", "two"]
    assert run(*options, "--out", tmp_path / "less", "--max-clips", 1).exit_code == 0
    with open(tmp_path / "less/clips.csv") as file:
        assert len(list(csv.DictReader(file))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give one of --synthetic, --tapvid PATH and --folder FOLDER"),
        (["--synthetic", "--folder", "x"], "give one of --synthetic"),
        (["--folder", "missing"], "holds no tracks/NNN.npy"),
        (["--tapvid", "missing"], "no such file"),
        (["--synthetic", "--steps", "1,x"], "--steps must be whole numbers with commas between them, got '1,x'"),
        (["--synthetic", "--layers", "1_0"], "--layers must be whole numbers with commas between them, got '1_0'"),
        (["--folder", "x", "--layers", "9"], "layers must be some from 0 to 3, got [9]"),
        (["--synthetic", "--model", "nano"], "--model must be difftrack or difftrack-nano, got 'nano'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_errors(tmp_path, weights, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--weights", weights, "--out", "out/tables", *options)
    assert result.exit_code == 2 and result.stdout == ""
    text = result.stderr.strip()  # an empty bar of progress leaves a blank line
    assert text.startswith("tritonkern: ") and message in text and "\n" not in text
    assert not (tmp_path / "out").exists()
