"""`tritonkern track | eval | train | doctor | bench`. A command imports what it needs when it runs."""

import copy
import errno
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata, util
from pathlib import Path
from typing import Annotated

from tritonkern.extras import how_to_install

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as _error:
    sys.stderr.write(f"tritonkern: the package {_error.name} is missing: {how_to_install('track')}\n")
    sys.exit(2)

app = typer.Typer(
    help="Attention and matching operations of point trackers, and points tracked in a video.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script."""
    app()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause and mend into one line on stderr and exit code 2; Ctrl-C into exit code 130.

    A warning is one line on stderr, too.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except KeyboardInterrupt:
        _fail("interrupted: nothing unfinished was kept", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tritonkern"):
            raise
        _fail(f"the package {error.name} is missing: {how_to_install('track')}")
    except OSError as error:
        remedies = {
            errno.ENOSPC: "free some space, or give another folder to --out",
            errno.EDQUOT: "free some of your quota, or give another folder to --out",
            errno.EFBIG: "raise the limit on file sizes (ulimit -f), or give another folder to --out",
            errno.EACCES: "change its permissions, or give another path",
            errno.EEXIST: "give a folder to --out, not a file",
        }
        if error.errno in remedies:
            name = f"{error.filename}: " if error.filename else ""
            _fail(f"{name}{os.strerror(error.errno)}: {remedies[error.errno]}")
        _fail(str(error))
    except ValueError as error:
        _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        # PyTorch's error, by name so that it need not be imported.
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):
            raise
        _fail("the memory is full: use --max-frames, fewer points, or another --device")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"tritonkern: warning: {' '.join(str(message).split())}\n")


def _fail(message: str, code: int = 2) -> None:
    sys.stderr.write(f"tritonkern: {' '.join(message.split())}\n")
    raise typer.Exit(code)


class Stages:
    """A progress bar on stderr for each stage of a job; calls come as `(stage, done, total or None)`."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def note(self, text: str) -> None:
        self._bars.console.print(text)

    def __enter__(self) -> "Stages":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


@app.command()
def track(
    video: Annotated[Path, typer.Argument(help="Video file, or folder of images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for tracks.npz, tracks.csv and overlay.mp4.", show_default=False)],
    grid: Annotated[int | None, typer.Option(help="Points a side of a regular grid.  [default: 10]", min=1)] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Points to track instead: .csv or .npz with t,x,y in pixels.")
    ] = None,
    query_frame: Annotated[int, typer.Option(help="Frame that the grid is laid on.", min=0)] = 0,
    model: Annotated[str, typer.Option(help="Name of the model.")] = "chrono-nano",
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of a model that ships without weights.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Read only so many frames.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Track points through a video."""
    with one_line_errors(), _writable_folder(out):
        _track(video, out, grid, queries, query_frame, model, weights, max_frames, device)


def _track(
    video: Path,
    out: Path,
    grid: int | None,
    queries: Path | None,
    query_frame: int,
    model: str,
    weights: Path | None,
    max_frames: int | None,
    device: str | None,
) -> None:
    if queries is not None and grid is not None:
        raise ValueError("--grid and --queries exclude each other: give one of them")
    if queries is not None and query_frame:
        raise ValueError("--query-frame goes with --grid: the file of --queries has a frame t for each point")

    from tritonkern.tracking import PointTracker, VideoReader, read_queries, write_overlay

    reader = VideoReader(video)
    points = None if queries is None else read_queries(queries)
    tracker = PointTracker(model, weights, device)
    npz, table, overlay = (out / name for name in ("tracks.npz", "tracks.csv", "overlay.mp4"))
    clock = _Stopwatch()
    with Stages() as stages:

        def progress(stage: str, done: int, total: int | None) -> None:
            stages(stage, done, total)
            clock.note(stage)

        result = tracker(
            reader,
            grid=grid,
            queries=points,
            query_frame=query_frame,
            max_frames=max_frames,
            progress=progress,
        )
        result.save_npz(npz)
        result.save_csv(table)
        write_overlay(overlay, reader, result, progress)

    count, frames = result.visibility.shape
    for path in (npz, table, overlay):
        typer.echo(path)
    per_frame = ", ".join(f"{stage} {1000 * seconds / frames:.1f} ms" for stage, seconds in clock.seconds.items())
    typer.echo(f"{count} points, {frames} frames; time per frame on {tracker.device}: {per_frame}")


@contextmanager
def _writable_folder(folder: Path) -> Iterator[None]:
    """Fail before the work rather than after it. Of the folders that this makes, those still empty at the end go."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        yield
    finally:
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


@app.command("eval")
def evaluate_model(
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
    out: Annotated[Path | None, typer.Option(help="JSON file for all scores, video by video.")] = None,
) -> None:
    """Score a model with the TAP-Vid metrics, in percent."""
    with one_line_errors(), nullcontext() if out is None else _writable_folder(out.parent):
        _evaluate(tapvid, synthetic, mode, model, weights, device, out)


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
    contestants = {model: tracker.model}
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
        typer.echo(out)


@app.command("train")
def train_model(
    out: Annotated[Path, typer.Option(help="Weights to write (.safetensors).", show_default=False)],
    steps: Annotated[int, typer.Option(help="Clips to learn from.", min=1)] = 2400,
    seed: Annotated[int, typer.Option(help="Decides the clips and the first weights.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Train chrono-nano from scratch on generated videos. An interrupted run continues when called again."""
    with one_line_errors():
        if out.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {out}")
        with _writable_folder(out.parent):
            _train(out, steps, seed, device)


def _train(out: Path, steps: int, seed: int, device: str | None) -> None:
    import torch

    from tritonkern.models import ChronoNano
    from tritonkern.tracking.predictor import choose_device
    from tritonkern.training import TrainingPlan, train

    torch.manual_seed(seed)
    model = ChronoNano().to(choose_device(device))
    plan = TrainingPlan(steps=steps, seed=seed)
    with Stages() as stages:

        def report(step: int, losses: dict[str, float]) -> None:
            stages("training", step, steps)
            if step % 50 == 0:
                stages.note(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

        train(model, out, plan, report=report)
    typer.echo(out)


class _Stopwatch:
    """Seconds spent in each stage, counted between the notes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


@app.command()
def doctor() -> None:
    """Say which backends each operation has here, why one is missing, and what to do."""
    with one_line_errors():
        from tritonkern.ops._backends import report

        typer.echo(report())
        packages = ("tritonkern", "torch", "triton", "numpy", "av", "pillow", "safetensors", "typer", "rich")
        typer.echo(f"\npython {sys.version.split()[0]}")
        for package in packages:
            typer.echo(f"{package} {_version(package)}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a checkout; further arguments go to pytest."""
    with one_line_errors():
        benchmarks = Path(__file__).parents[1] / "benchmarks"
        if not benchmarks.is_dir():
            raise ValueError(
                "the benchmarks are not part of the installed package: clone the repository, "
                "and run `pip install -e .[test]` and `tritonkern bench` there"
            )
        if util.find_spec("pytest_benchmark") is None:
            raise ValueError(f"the benchmarks need pytest-benchmark: {how_to_install('test')}")
        command = [sys.executable, "-m", "pytest", str(benchmarks), "--benchmark-only", *context.args]
        raise typer.Exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
