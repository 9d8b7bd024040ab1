"""`tritonkern track`: follow points through a video, write the tracks, an overlay and a report."""

import os
from pathlib import Path
from typing import Annotated

import typer

from tritonkern.commands._stream import parse_size, track_stream
from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, whole, writable_folder

_RESULTS = ("tracks.npz", "tracks.csv", "overlay.mp4", "report.html")
_OVERLAYS = ("none", "tails", "dots")


def track(
    video: Annotated[
        str, typer.Argument(help="Video file, animated image or TIFF stack, or folder of images.", show_default=False)
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help=f"Folder for {', '.join(_RESULTS)}. An earlier run's results there are replaced together. "
            "With --stream only tracks.csv; a name ending in .parquet is a folder of Parquet files instead.  "
            "[default: the name of VIDEO and -tracks, in the current folder]"
        ),
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="Points per side of a regular grid.  [default: 10]", **whole(1))
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Points to track instead: .csv or .npz with t,x,y in pixels.")
    ] = None,
    query_frame: Annotated[int, typer.Option(help="Frame in which the grid is placed.", **whole(0))] = 0,
    model: Annotated[
        str, typer.Option(help="Name of the model, such as nano or bootstapir; docs/models.md lists them.")
    ] = "nano",
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint of a model that ships without weights; chrono-locotrack needs both."),
    ] = None,
    max_frames: Annotated[int | None, typer.Option(help="Read at most this many frames.", **whole(1))] = None,
    stride: Annotated[
        int, typer.Option(help="Read every so many-th frame; t counts the frames that are read.", **whole(1))
    ] = 1,
    min_confidence: Annotated[
        float, typer.Option(help="A point is visible from this confidence on.", min=0, max=1)
    ] = 0.5,
    overlay: Annotated[
        str, typer.Option(help="How overlay.mp4 shows the points: tails, dots, or none for no overlay.mp4.")
    ] = "tails",
    resize: Annotated[
        int | None,
        typer.Option(help="Longer side of overlay.mp4 in pixels; tracks stay in pixels of VIDEO.", **whole(16)),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html, or do not.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read VIDEO once, as it arrives, and write tracks.csv (or Parquet, see --out) frame by frame. "
            "VIDEO may then be a camera (/dev/video0), an address (rtsp://...) or - for standard input, too.",
        ),
    ] = False,
    lookahead: Annotated[int, typer.Option(help="With --stream: frames that a result waits for.", **whole(0))] = 6,
    drop: Annotated[
        bool, typer.Option("--drop", help="With --stream: drop frames, and count them, where tracking is too slow.")
    ] = False,
    buffer: Annotated[int, typer.Option(help="With --stream: frames that may wait to be tracked.", **whole(1))] = 64,
    raw_size: Annotated[
        str | None, typer.Option(help="With --stream -: standard input is raw RGB of 8 bits of WIDTHxHEIGHT pixels.")
    ] = None,
) -> None:
    """Track points through a video.

    The packaged model sees frames of 256x256 pixels, whatever the size of VIDEO: things that are only a few pixels wide
    at that size cannot be followed.
    """
    with one_line_errors():
        if overlay not in _OVERLAYS:
            raise ValueError(f"--overlay must be one of {', '.join(_OVERLAYS)}, got {overlay!r}")
        folder = _default_folder(video) if out is None else output_path("--out", out)
        if queries is not None and grid is not None:
            raise ValueError("--grid and --queries exclude each other: give one of them")
        if queries is not None and query_frame:
            raise ValueError("--query-frame goes with --grid: the file of --queries has a frame t for each point")
        if stream:
            if resize is not None:
                raise ValueError("--resize goes with overlay.mp4, which --stream does not write")
            with writable_folder(folder):
                stale = [folder / name for name in _RESULTS if name != "tracks.csv"]
                track_stream(
                    video, folder, stale, grid=grid, queries=queries, query_frame=query_frame, model=model,
                    weights=weights, device=device, max_frames=max_frames, stride=stride, min_confidence=min_confidence,
                    lookahead=lookahead, drop=drop, buffer=buffer, raw_size=parse_size(raw_size),
                )  # fmt: skip
            return
        if drop or raw_size is not None:
            raise ValueError("--drop and --raw-size go with --stream")
        if folder.suffix == ".parquet":
            raise ValueError(
                f"--out {folder} ends in .parquet, which goes with --stream: give another name of a folder"
            )
        with writable_folder(folder):
            from tritonkern.files import atomic_path, atomic_paths
            from tritonkern.tracking import PointTracker, VideoReader, write_overlay, write_report
            from tritonkern.tracking.results import CSV_HEADER
            from tritonkern.tracking.stored_tracks import StoredTracks

            reader = VideoReader(video, stride)
            tracker = PointTracker(model, weights, device)
            unwanted = {"overlay.mp4": overlay == "none", "report.html": not report}
            wanted = [folder / name for name in _RESULTS if not unwanted.get(name)]
            stale = [folder / name for name in _RESULTS if unwanted.get(name)]
            with Stages() as stages, atomic_paths(wanted, stale) as parts:
                hidden = dict(zip((path.name for path in wanted), parts, strict=True))
                stored = StoredTracks()
                with atomic_path(hidden["tracks.csv"]) as csv_path, open(csv_path, "wb") as csv:
                    csv.write(CSV_HEADER)
                    for first, tracks in tracker.spans(
                        reader,
                        grid=grid,
                        queries=queries,
                        query_frame=query_frame,
                        max_frames=max_frames,
                        min_confidence=min_confidence,
                        progress=stages,
                    ):
                        csv.writelines(tracks.csv_lines(first))
                        csv.flush()
                        stored.append(tracks)
                result = stored.tracks()
                result.save_npz(hidden["tracks.npz"])
                if overlay != "none":
                    write_overlay(hidden["overlay.mp4"], reader, result, stages, overlay, resize)
                if report:
                    write_report(hidden["report.html"], reader, result, stages)

            count, frames = result.visibility.shape
            for path in wanted:
                print_path(path)
            per_frame = ", ".join(
                f"{stage} {1000 * seconds / frames:.1f} ms" for stage, seconds in stages.seconds.items()
            )
            typer.echo(f"{count} points, {frames} frames; time per frame on {tracker.device}: {per_frame}")


def _default_folder(video: str) -> Path:
    if video == "-":
        return Path("stream-tracks")
    return Path(f"{Path(os.path.abspath(video)).stem}-tracks")
