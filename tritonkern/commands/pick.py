"""`tritonkern pick`: choose the points to track by clicking into a frame."""

from typing import Annotated

import typer

from tritonkern.commands._terminal import one_line_errors, output_path, print_path, whole, writable_folder


def pick(
    video: Annotated[str, typer.Argument(help="Video file, or folder of images.", show_default=False)],
    out: Annotated[str, typer.Option(help="File to write, for --queries of `tritonkern track`.")] = "queries.csv",
    frame: Annotated[int, typer.Option(help="Frame to show.", **whole(0))] = 0,
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.", **whole(0, 65535))] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser, or only print its address.")] = True,
) -> None:
    """Click points in one frame of a video, in a page that only this machine can open."""
    with one_line_errors():
        path = output_path("--out", out)
        with writable_folder(path.parent):
            from tritonkern.tracking.pick import pick_points

            count = pick_points(
                video, path, frame=frame, port=port, open_browser=browser, announce=lambda url: typer.echo(url)
            )
            print_path(path)
            typer.echo(f"{count} points in frame {frame}")
