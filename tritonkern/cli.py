"""The console script `tritonkern track | label | pick | eval | analyse | train | doctor | bench`.

The commands are in `tritonkern.commands`.
"""

import sys
from typing import Annotated

from tritonkern._optional import how_to_install
from tritonkern.commands.doctor import doctor, version

try:
    import typer

    from tritonkern.commands.analyse import analyse
    from tritonkern.commands.bench import bench
    from tritonkern.commands.evaluate import evaluate
    from tritonkern.commands.label import label
    from tritonkern.commands.pick import pick
    from tritonkern.commands.track import track
    from tritonkern.commands.train import train
except ModuleNotFoundError as _error:
    if sys.argv[1:2] == ["doctor"]:
        sys.exit(doctor("--strict" in sys.argv))
    sys.stderr.write(f"tritonkern: the package {_error.name} is missing: {how_to_install('track')}\n")
    sys.exit(2)

app = typer.Typer(
    help="Attention and matching operations of point trackers, and points tracked in a video.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(track)
app.command()(label)
app.command()(pick)
app.command("eval")(evaluate)
app.command()(analyse)
app.command()(train)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


@app.command("doctor")
def _doctor(
    strict: Annotated[
        bool, typer.Option("--strict", help="End with exit code 1 if a fast backend of this machine is missing.")
    ] = False,
) -> None:
    """Show whether this machine has its fast backends, what is missing, and what to do."""
    raise typer.Exit(doctor(strict))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tritonkern {version('tritonkern')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None: ...


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
