"""`tritonkern eval`: score a model with the TAP-Vid metrics."""

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, writable_folder


def evaluate(
    tapvid: Annotated[
        Path | None, typer.Option(help="TAP-Vid pickle, or folder of them (DAVIS, RGB-Stacking, Kinetics, RoboTAP).")
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Generated clips of moving photographs instead, with baselines.")
    ] = False,
    mode: Annotated[str, typer.Option(help="Queries: first, strided or both.")] = "both",
    model: Annotated[str, typer.Option(help="Name of the model.")] = "chrono-nano",
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of a model that ships without weights.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
    out: Annotated[str | None, typer.Option(help="JSON file for all scores, video by video.")] = None,
) -> None:
    """Score a model with the TAP-Vid metrics, in percent."""
    with one_line_errors():
        path = None if out is None else output_path("--out", out)
        with nullcontext() if path is None else writable_folder(path.parent):
            _evaluate(tapvid, synthetic, mode, model, weights, device, path)


def _evaluate(
    tapvid: Path | None,
    synthetic: bool,
    mode: str,
    model: str,
    weights: Path | None,
    device: str | None,
    out: Path | None,
) -> None:
    if synthetic == (tapvid is not None):
        raise ValueError("give either --tapvid PATH or --synthetic")

    from tritonkern.models import ChronoNano
    from tritonkern.tracking import PointTracker
    from tritonkern.tracking.evaluation import StandingStill, evaluate, query_modes, save_scores
    from tritonkern.tracking.tapvid import TapVidClip, read_tapvid

    query_modes(mode)
    tracker = PointTracker(model, weights, device)
    contestants: dict[str, Any] = {model: tracker.model}
    clips: Iterable[TapVidClip]
    if tapvid is not None:
        clips = read_tapvid(tapvid)
    else:
        from tritonkern.training import photo_clips

        try:
            clips = [TapVidClip(clip.name, clip.video, clip.points, clip.occluded) for clip in photo_clips()]
        except ImportError as error:
            raise ValueError(str(error)) from error
        contestants["standing still"] = StandingStill().to(tracker.device)
        if isinstance(tracker.model, ChronoNano):
            frame_by_frame = copy.deepcopy(tracker.model)
            frame_by_frame.temporal = False
            contestants[f"{model}, temporal adapters off"] = frame_by_frame

    scores = {}
    for name, contestant in contestants.items():
        with Stages() as stages:
            scores[name] = evaluate(contestant, clips, mode, progress=stages)

    columns = ("delta_avg", "AJ", "OA")
    table = Table("tracker", "queries", box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="right")
    for name, modes in scores.items():
        for queries, evaluation in modes.items():
            table.add_row(name, queries, *(f"{evaluation.mean[column]:.1f}" for column in columns))
    Console().print(table)
    if out is not None:
        save_scores(out, scores)
        print_path(out)
