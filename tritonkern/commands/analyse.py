"""`tritonkern analyse`: where and at which noise a video diffusion transformer matches points."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, whole, writable_folder

if TYPE_CHECKING:
    from tritonkern.tracking.tapvid import TapVidClip

# Not those of `tritonkern eval`: what is chosen by this table can be scored there.
_SEED = 2030


def analyse(
    out: Annotated[str, typer.Option(help="Folder for mean.csv, clips.csv and heat-map.png.", show_default=False)],
    model: Annotated[str, typer.Option(help="difftrack-nano, or difftrack with --weights FOLDER.")] = "difftrack-nano",
    weights: Annotated[
        list[Path] | None, typer.Option(help="Folder of CogVideoX-2B or -5B as diffusers writes it.")
    ] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Generated clips of moving photographs.")] = False,
    tapvid: Annotated[Path | None, typer.Option(help="TAP-Vid pickle, or folder of them.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of tracks/NNN.npy, visibility/NNN.npy and videos/NNN.*.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of layers, as 0,1,2.  [default: all]")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Steps of 50, from noise (0) to data (49).  [default: every fifth]")
    ] = None,
    max_clips: Annotated[int | None, typer.Option(help="At most so many clips.", **whole(1))] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Repeat the choices of the published code; docs/difftrack.md lists them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.", **whole(0))] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Matching accuracy, confidence and attention of a video diffusion transformer, by layer and noise level."""
    with one_line_errors():
        path = output_path("--out", out)
        if (tapvid is not None) + (folder is not None) + synthetic != 1:
            raise ValueError("give one of --synthetic, --tapvid PATH and --folder FOLDER")
        with writable_folder(path):
            from tritonkern.models import DiffTrack
            from tritonkern.tracking import PointTracker
            from tritonkern.tracking.analysis import STEPS
            from tritonkern.tracking.analysis import analyse as run

            chosen = None if layers is None else _numbers("--layers", layers)
            times = STEPS if steps is None else _numbers("--steps", steps)
            if model not in ("difftrack", "difftrack-nano"):
                raise ValueError(f"--model must be difftrack or difftrack-nano, got {model!r}")
            tracker = PointTracker(model, weights, device).model
            assert isinstance(tracker, DiffTrack)
            clips = _clips(tapvid, folder, max_clips)
            with Stages() as stages:
                result = run(tracker, clips, layers=chosen, steps=times, official=official, seed=seed, progress=stages)
            for written in result.save(path):
                print_path(written)


def _numbers(option: str, text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text, re.ASCII):
        raise ValueError(f"{option} must be whole numbers with commas between them, got {text!r}")
    return [int(number) for number in text.split(",")]


def _clips(tapvid: Path | None, folder: Path | None, most: int | None) -> Iterable["TapVidClip"]:
    from itertools import islice

    from tritonkern.tracking.tapvid import TapVidClip, read_tapvid
    from tritonkern.tracking.track_folder import read_track_folder

    if tapvid is not None:
        return islice(read_tapvid(tapvid), most)
    if folder is not None:
        return islice(read_track_folder(folder), most)
    from tritonkern.training import photo_clips

    try:
        made = list(photo_clips(min(8, most or 8), seed=_SEED))
    except ImportError as error:
        raise ValueError(str(error)) from error
    return [TapVidClip(clip.name, clip.video, clip.points, clip.occluded) for clip in made]
