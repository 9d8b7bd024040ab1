"""`tritonkern train`: train a small tracker on generated videos."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, whole, writable_folder


def train(
    out: Annotated[str, typer.Option(help="Weights to write (.safetensors).", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="chrono-nano; nano, a refiner on the packaged chrono-nano; difftrack-nano, which sees no tracks; or "
            "ditracker-nano, on the packaged difftrack-nano."
        ),
    ] = "chrono-nano",
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of steps.  [default: 2400 of chrono-nano, 4000 of nano, 6000 of difftrack-nano, "
            "1500 of ditracker-nano]",
            **whole(1),
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the clips and initial weights.  [default: 0, of nano 1]", **whole(0))
    ] = None,
    clips: Annotated[
        Path | None,
        typer.Option(
            help="Folder for rendered clips of nano, 28 MB each, or ditracker-nano, 1.2 MB.  "
            "[default: clips, beside --out]"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Train a tracker on generated videos. An interrupted run continues when called again."""
    with one_line_errors():
        path = output_path("--out", out)
        if path.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {path}")
        if model not in ("chrono-nano", "nano", "difftrack-nano", "ditracker-nano"):
            raise ValueError(f"--model must be chrono-nano, nano, difftrack-nano or ditracker-nano, got {model!r}")
        with writable_folder(path.parent), Stages() as stages:
            _train(path, model, steps, seed, clips or path.parent / "clips", device, stages)
            print_path(path)


def _train(
    path: Path, model: str, steps: int | None, seed: int | None, clips: Path, device: str | None, stages: Stages
) -> None:
    import torch

    from tritonkern.models import ChronoNano, DiffTrackNano, DiTrackerNano, Nano, packaged
    from tritonkern.tracking.predictor import choose_device
    from tritonkern.training import (
        AdaptingPlan,
        DenoisingPlan,
        RefiningPlan,
        TrainingPlan,
        train_denoiser,
        train_ditracker,
        train_nano,
    )
    from tritonkern.training import train as run

    def report(step: int, losses: dict[str, float]) -> None:
        stages("training", step, plan.steps)
        if step % 50 == 0:
            stages.note(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

    given: dict[str, Any] = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    plan: TrainingPlan | RefiningPlan | DenoisingPlan | AdaptingPlan
    if model == "nano":
        plan = RefiningPlan(**given)
        torch.manual_seed(plan.seed)
        train_nano(
            Nano.from_chrono(packaged("chrono-nano")).to(choose_device(device)), path, clips, plan, report=report
        )
    elif model == "difftrack-nano":
        plan = DenoisingPlan(**given)
        torch.manual_seed(plan.seed)
        train_denoiser(DiffTrackNano().transformer.to(choose_device(device)), path, plan, report=report)
    elif model == "ditracker-nano":
        plan = AdaptingPlan(**given)
        torch.manual_seed(plan.seed)
        tracker = DiTrackerNano.from_difftrack(packaged("difftrack-nano")).to(choose_device(device))
        train_ditracker(tracker, path, clips, plan, report=report)
    else:
        plan = TrainingPlan(**given)
        torch.manual_seed(plan.seed)
        run(ChronoNano().to(choose_device(device)), path, plan, report=report)
