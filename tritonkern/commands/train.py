"""`tritonkern train`: train chrono-nano on generated videos."""

from typing import Annotated

import typer

from tritonkern.commands._terminal import Stages, one_line_errors, output_path, print_path, writable_folder


def train(
    out: Annotated[str, typer.Option(help="Weights to write (.safetensors).", show_default=False)],
    steps: Annotated[int, typer.Option(help="Number of training clips.", min=1)] = 2400,
    seed: Annotated[int, typer.Option(help="Seed of the clips and of the initial weights.", min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda if there is one]")] = None,
) -> None:
    """Train chrono-nano from scratch on generated videos. An interrupted run continues when called again."""
    with one_line_errors():
        path = output_path("--out", out)
        if path.suffix != ".safetensors":
            raise ValueError(f"--out must end in .safetensors, got {path}")
        with writable_folder(path.parent):
            import torch

            from tritonkern.models import ChronoNano
            from tritonkern.tracking.predictor import choose_device
            from tritonkern.training import TrainingPlan
            from tritonkern.training import train as run

            torch.manual_seed(seed)
            model = ChronoNano().to(choose_device(device))
            with Stages() as stages:

                def report(step: int, losses: dict[str, float]) -> None:
                    stages("training", step, steps)
                    if step % 50 == 0:
                        stages.note(f"step {step}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))

                run(model, path, TrainingPlan(steps=steps, seed=seed), report=report)
            print_path(path)
