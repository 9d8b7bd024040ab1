"""What `tritonkern track` says about folders and files that DiffTrack cannot use."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_difftrack import folder  # noqa: F401
from typer.testing import CliRunner

from tritonkern.cli import app
from tritonkern.models import DiffTrackNano


def video(path, frames=3):
    first, *rest = (Image.fromarray(np.full((32, 48, 3), 40 * t, dtype=np.uint8)) for t in range(frames))
    first.save(path, save_all=True, append_images=rest)
    return path


def track(tmp_path, *options, frames=3):
    out = tmp_path / "made" / "out"
    source = video(tmp_path / "video.png", frames)
    result = CliRunner().invoke(app, ["track", str(source), "--out", str(out), "--grid", "2", *map(str, options)])
    return result, out


def refused(tmp_path, message, *options, frames=3):
    result, out = track(tmp_path, *options, frames=frames)
    assert result.exit_code == 2 and result.stdout == "", result.output
    last = result.stderr.splitlines()[-1]  # below the bars of progress, if there are any
    assert last.startswith("tritonkern: ") and message in last
    assert not out.parent.exists()


def nano(path):
    torch.manual_seed(0)
    save_file({name: x.half() for name, x in DiffTrackNano().transformer.state_dict().items()}, path)
    return path


def test_track_with_nano(tmp_path):
    result, out = track(tmp_path, "--model", "difftrack-nano", "--weights", nano(tmp_path / "nano.safetensors"))
    assert result.exit_code == 0, result.output
    assert (out / "tracks.npz").is_file() and "4 points, 3 frames" in result.stdout


def test_one_frame(tmp_path):
    options = "--model", "difftrack-nano", "--weights", nano(tmp_path / "nano.safetensors")
    refused(tmp_path, "video must have two frames or more, got 1", *options, frames=1)


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    refused(tmp_path, "other.safetensors", "--model", "difftrack-nano", "--weights", path)
    path.write_bytes(nano(tmp_path / "nano.safetensors").read_bytes()[:5000])
    refused(tmp_path, "other.safetensors", "--model", "difftrack-nano", "--weights", path)


def no_transformer(at):
    (at / "transformer" / "config.json").unlink()


def another_class(at):
    path = at / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "WanTransformer3DModel"}))


def no_json(at):
    (at / "transformer" / "config.json").write_text("{")


def damaged(at):
    path = next((at / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])


def no_weights(at):
    next((at / "transformer").glob("*.safetensors")).unlink()


def no_vae(at):
    (at / "vae" / "config.json").unlink()


def no_prompt(at):
    (at / "prompt_embeds.safetensors").unlink()


def two_prompts(at):
    save_file({"a": torch.zeros(1, 5, 12), "b": torch.zeros(1)}, at / "prompt_embeds.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_transformer, "holds no transformer"),
        (another_class, "is of WanTransformer3DModel, not of a CogVideoXTransformer3DModel"),
        (no_json, "is not readable JSON"),
        (damaged, "safetensors"),
        (no_weights, "holds no .safetensors file"),
        (no_vae, "holds no vae/config.json"),
        (no_prompt, "holds neither prompt_embeds.safetensors"),
        (two_prompts, "must hold one tensor [1, L, C]"),
        (lambda at: None, "none is published for 2 heads and 3 layers"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_folders(tmp_path, folder, change, message):  # noqa: F811
    change(folder)
    refused(tmp_path, message, "--model", "difftrack", "--weights", folder)


def test_no_folder(tmp_path):
    refused(tmp_path, "give the path of a folder of CogVideoX-2B or -5B", "--model", "difftrack")
    refused(tmp_path, "does not exist or is not a folder", "--model", "difftrack", "--weights", tmp_path / "missing")
