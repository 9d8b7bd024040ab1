"""`tritonkern track`: follow points through a video, write the tracks and an overlay."""

from pathlib import Path
from typing import Annotated

import typer

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, writable_folder


def track(
    video: Annotated[str, typer.Argument(help="Video file, or folder of images.", show_default=False)],
    out: Annotated[str, typer.Option(help="Folder for tracks.npz, tracks.csv and overlay.mp4.", show_default=False)],
    grid: Annotated[int | None, typer.Option(help="Points a side of a regular grid.  [default: 10]", min=1)] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Points to track instead: .csv or .npz with t,x,y in pixels.")
    ] = None,
    query_frame: Annotated[int, typer.Option(help="Frame in which the grid is placed.", min=0)] = 0,
    model: Annotated[str, typer.Option(help="Name of the model.")] = "chrono-nano",
    weights: Annotated[Path | None, typer.Option(help="Checkpoint of a model that ships without weights.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Read at most this many frames.", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Track points through a video."""
    with one_line_errors():
        folder = output_path("--out", out)
        with writable_folder(folder):
            if queries is not None and grid is not None:
                raise ValueError("--grid and --queries exclude each other: give one of them")
            if queries is not None and query_frame:
                raise ValueError("--query-frame goes with --grid: the file of --queries has a frame t for each point")

            from tritonkern.tracking import PointTracker, VideoReader, read_queries, write_overlay

            reader = VideoReader(video)
            points = None if queries is None else read_queries(queries)
            tracker = PointTracker(model, weights, device)
            npz, table, overlay = (folder / name for name in ("tracks.npz", "tracks.csv", "overlay.mp4"))
            with Stages() as stages:
                result = tracker(
                    reader,
                    grid=grid,
                    queries=points,
                    query_frame=query_frame,
                    max_frames=max_frames,
                    progress=stages,
                )
                result.save_npz(npz)
                result.save_csv(table)
                write_overlay(overlay, reader, result, stages)

            count, frames = result.visibility.shape
            for path in (npz, table, overlay):
                print_path(path)
            per_frame = ", ".join(
                f"{stage} {1000 * seconds / frames:.1f} ms" for stage, seconds in stages.seconds.items()
            )
            typer.echo(f"{count} points, {frames} frames; time per frame on {tracker.device}: {per_frame}")
