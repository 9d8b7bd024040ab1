"""`tritonkern eval`: score a model with the TAP-Vid metrics."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, writable_folder

if TYPE_CHECKING:
    from tritonkern.tracking.evaluation import Evaluation
    from tritonkern.training import Clip


def evaluate(
    tapvid: Annotated[
        Path | None, typer.Option(help="TAP-Vid pickle, or folder of them (DAVIS, RGB-Stacking, Kinetics, RoboTAP).")
    ] = None,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic",
            help="Generated clips of moving photographs instead: four tables, roughly half an hour.",
        ),
    ] = False,
    mode: Annotated[str, typer.Option(help="Queries: first, strided or both.")] = "both",
    model: Annotated[
        str, typer.Option(help="Name of the model, such as nano or bootstapir; docs/models.md lists them.")
    ] = "nano",
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint of a model that ships without weights; chrono-locotrack needs both."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
    bins: Annotated[
        bool, typer.Option("--bins", help="Also score by how far points move and how often they reappear.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="JSON file for all scores, video by video.")] = None,
) -> None:
    """Score a model and the trackers to compare with, by the TAP-Vid metrics, in percent."""
    with one_line_errors():
        path = None if out is None else output_path("--out", out)
        with nullcontext() if path is None else writable_folder(path.parent):
            _evaluate(tapvid, synthetic, mode, model, weights, device, bins, path)


def _evaluate(
    tapvid: Path | None,
    synthetic: bool,
    mode: str,
    model: str,
    weights: list[Path] | None,
    device: str | None,
    bins: bool,
    out: Path | None,
) -> None:
    if synthetic == (tapvid is not None):
        raise ValueError("give either --tapvid PATH or --synthetic")

    from tritonkern.models import DiffTrackNano, DiTrackerNano, packaged
    from tritonkern.tracking import PointTracker
    from tritonkern.tracking.baselines import baselines
    from tritonkern.tracking.evaluation import evaluate, query_modes, save_scores
    from tritonkern.tracking.tapvid import TapVidClip, read_tapvid

    query_modes(mode)
    tracker = PointTracker(model, weights, device)
    trackers: dict[str, Any] = {model: tracker.model}
    for name, other in baselines(tracker.device).items():
        trackers.setdefault(name, other)
    sets: dict[str, Callable[[], Iterable[TapVidClip]]]
    if tapvid is not None:
        sets = {tapvid.name: lambda: read_tapvid(tapvid)}
    else:
        from tritonkern.training import SETS

        def clips_of(make: Callable[[], Iterable["Clip"]]) -> list[TapVidClip]:
            try:
                return [TapVidClip(clip.name, clip.video, clip.points, clip.occluded) for clip in make()]
            except ImportError as error:
                raise ValueError(str(error)) from error

        sets = {name: partial(clips_of, make) for name, make in SETS.items()}

    scores: dict[str, dict[str, dict[str, Evaluation]]] = {}
    # On one set only: a pass of the transformer for every query frame and seven others takes its time.
    ablations: dict[str, Any] = {}
    if isinstance(tracker.model, DiffTrackNano):
        ablations = dict(tracker.model.ablations())
    elif isinstance(tracker.model, DiTrackerNano):
        ablations = dict(tracker.model.ablations(packaged("difftrack-nano")))
    for title, read in sets.items():
        # Generated clips are kept for all trackers; those of a file, which may be many, are read for each.
        clips = [] if tapvid is not None else read()
        results = scores[title] = {}
        for name, contestant in {model: tracker.model, **ablations, **trackers}.items():
            with Stages() as stages:
                dataset = read() if tapvid is not None else clips
                results[name] = evaluate(contestant, dataset, mode, bins=bins, progress=stages)
        ablations = {}
        console = Console()
        # In a narrow window lines that go on in the next one are better than figures that are cut off.
        console.width = max(console.width, 128)
        console.print(_table(title, results))
        for kind in ("motion", "reappearance") if bins else ():
            console.print(_bin_table(f"{title}, by {kind}", results, kind))
    if out is not None:
        save_scores(out, scores)
        print_path(out)


def _table(title: str, results: Mapping[str, Mapping[str, "Evaluation"]]) -> Table:
    columns = ("delta_1", "delta_2", "delta_4", "delta_8", "delta_16", "delta_avg", "AJ", "OA")
    table = Table("tracker", "queries", title=title, box=box.SIMPLE)
    for column in (*columns, "ms / frame", "MiB"):
        table.add_column(column.replace("delta", "d"), justify="right")
    for name, modes in results.items():
        for queries, evaluation in modes.items():
            cost = f"{1000 * evaluation.seconds_per_frame:.0f}", f"{evaluation.peak_memory:.0f}"
            table.add_row(name, queries, *(f"{evaluation.mean[column]:.1f}" for column in columns), *cost)
    return table


def _bin_table(title: str, results: Mapping[str, Mapping[str, "Evaluation"]], kind: str) -> Table:
    from tritonkern.tracking.bins import BIN_METRICS

    table = Table("tracker", "queries", kind, title=title, box=box.SIMPLE)
    for column in ("tracks", *BIN_METRICS):
        table.add_column(column, justify="right")
    for name, modes in results.items():
        for queries, evaluation in modes.items():
            for bin_name, row in evaluation.bins[kind].items():
                scores = (f"{row[column]:.1f}" for column in BIN_METRICS)
                table.add_row(name, queries, bin_name, f"{row['tracks']:.0f}", *scores)
    return table
