"""`tritonkern label`: tracks of many videos as Parquet files, by processes of this machine or on a Ray cluster."""

from pathlib import Path
from typing import Annotated

import typer

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, whole, writable_folder


def label(
    manifest: Annotated[
        Path,
        typer.Argument(
            help=".csv or .parquet with a column video, and if wanted id and queries (a .csv or .npz with t,x,y). "
            "Paths are relative to its folder.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder for tracks-*.parquet; an earlier run in it is continued.")],
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, each with its model; with --ray at most so many actors.  [default: 1]", **whole(1)
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Label on Ray: local for this machine, auto or ray://HOST:PORT for a cluster.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Name of the model, such as nano or bootstapir; docs/models.md lists them.")
    ] = "nano",
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint of a model that ships without weights; chrono-locotrack needs both."),
    ] = None,
    grid: Annotated[
        int | None,
        typer.Option(help="Points per side of the grid in clips without queries.  [default: 10]", **whole(1)),
    ] = None,
    max_frames: Annotated[
        int | None, typer.Option(help="Read at most this many frames of a video.", **whole(1))
    ] = None,
    stride: Annotated[
        int, typer.Option(help="Read every so many-th frame; t counts the frames that are read.", **whole(1))
    ] = 1,
    min_confidence: Annotated[
        float, typer.Option(help="A point is visible from this confidence on.", min=0, max=1)
    ] = 0.5,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one; cpu with --ray]")
    ] = None,
) -> None:
    """Track points in many videos, one row per video.

    The same command continues a run that was killed: finished videos are not tracked again. A video that cannot be read
    is a row whose column error says why.
    """
    with one_line_errors():
        folder_path = output_path("--out", out)
        from tritonkern.tracking.label_workers import label_in_processes
        from tritonkern.tracking.labels import LabelFolder, LabelOptions, read_manifest

        if ray is not None:
            from tritonkern.integrations.ray import label_with_ray
        clips = read_manifest(manifest)
        checkpoints = tuple(str(path.resolve()) for path in weights or ())
        options = LabelOptions(model, checkpoints, device, grid, max_frames, stride, min_confidence)
        options.tracker()  # a wrong model or checkpoint is an error before any process starts
        with writable_folder(folder_path), LabelFolder(folder_path, options) as folder:
            todo = [clip for clip in clips if clip.id not in folder.done]
            if ray is not None:
                if todo:
                    label_with_ray(manifest, folder, options, ray, workers)
            else:
                with Stages() as stages:
                    count = len(clips) - len(todo)

                    def finished(_: object) -> None:
                        nonlocal count
                        count += 1
                        stages("labelling", count, len(clips))

                    label_in_processes(todo, manifest.parent, folder, options, workers or 1, finished)
            errors = folder.finish()
        print_path(folder_path)
        typer.echo(
            f"{len(clips)} clips, of which {len(clips) - len(todo)} were done before; rows with an error: {errors}"
        )
