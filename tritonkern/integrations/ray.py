"""Labelling with Ray Data: a pool of actors with one tracker each, and a checkpoint of the finished ids.

Ray reads the manifest itself, because its checkpoint drops finished rows in read operators only. Each clip is a block,
so that an actor that dies loses one clip, which Ray gives to another actor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tritonkern._optional import how_to_install
from tritonkern.tracking.labels import Clip, LabelFolder, LabelOptions, csv_options, label_clip, manifest_columns

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data
    from ray.data.checkpoint import CheckpointConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"--ray needs the package {error.name}: {how_to_install('ray')}", name=error.name
    ) from error

_OTHER_CPUS = 2
"""Left to the filter of finished ids, which is an actor, too, and to the tasks that read and write."""


def label_with_ray(
    manifest: str | os.PathLike[str],
    folder: LabelFolder,
    options: LabelOptions,
    address: str = "local",
    actors: int | None = None,
) -> None:
    """Label the clips of `manifest` that `folder` lacks, on a Ray cluster.

    All nodes must see the videos and the folder under the same paths, and have this package installed.

    Args:
        manifest: as in `tritonkern.tracking.labels.read_manifest`.
        folder: an open `LabelFolder`; call its `finish` afterwards.
        options: how to track; with the device "cuda" each actor takes one GPU, otherwise one CPU.
        address: "local" starts a cluster of this machine's cores for the call; "auto" or "ray://HOST:PORT" joins one.
        actors: the most actors; None takes all GPUs, or all CPUs but two.

    Raises:
        ValueError: so many actors that Ray would wait forever for CPUs to read and filter the manifest.
    """
    manifest = Path(manifest).resolve()
    started = not ray.is_initialized()
    if started:
        cpus = max(1 + _OTHER_CPUS, os.cpu_count() or 1)
        here: dict[str, Any] = {"num_cpus": cpus} if address == "local" else {}
        ray.init(
            address, log_to_driver=False, configure_logging=False, include_dashboard=False if here else None, **here
        )
    context = ray.data.DataContext.get_current()
    before = context.checkpoint_config, context.enable_progress_bars
    try:
        pool = _pool_size(ray.cluster_resources(), options, actors)
        names, _ = manifest_columns(manifest)
        key = "id" if "id" in names else "video"
        context.checkpoint_config = _checkpoint(folder, key)
        context.enable_progress_bars = False
        if manifest.suffix.lower() == ".csv":
            clips = ray.data.read_csv(str(manifest), convert_options=csv_options())
        else:
            clips = ray.data.read_parquet(str(manifest), columns=names)
        clips.repartition(target_num_rows_per_block=1).map_batches(
            _Labeller,
            fn_constructor_args=(manifest.parent, options),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool),
            num_cpus=1,
            num_gpus=1 if options.device == "cuda" else None,
        ).write_parquet(str(folder.unmerged_folder.resolve()))
        folder.scan()
    finally:
        context.checkpoint_config, context.enable_progress_bars = before
        if started:
            ray.shutdown()


class _Labeller:
    """An actor: the model is loaded once."""

    def __init__(self, base: Path, options: LabelOptions) -> None:
        self.base, self.options, self.tracker = base, options, options.tracker()

    def __call__(self, rows: pa.Table) -> pa.Table:
        (row,) = rows.to_pylist()
        clip = Clip(row.get("id", row["video"]), row["video"], row.get("queries") or "")
        return label_clip(self.tracker, clip, self.base, self.options)


def _pool_size(resources: dict[str, float], options: LabelOptions, actors: int | None) -> int:
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    most = min(gpus, cpus - _OTHER_CPUS) if options.device == "cuda" else cpus - _OTHER_CPUS
    if most < 1 or (actors or 1) > most:
        raise ValueError(
            f"workers must be from 1 to {most} on this Ray cluster of {cpus} CPUs and {gpus} GPUs, got {actors or 1}: "
            f"an actor takes a CPU (with --device cuda also a GPU), and {_OTHER_CPUS} CPUs are for reading and writing"
        )
    return actors or most


def _checkpoint(folder: LabelFolder, key: str) -> CheckpointConfig:
    """Ray's checkpoint, made from the rows that are in the folder: these are the only record of what is done."""
    path = folder.checkpoint_folder.resolve()
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    if folder.done:
        pq.write_table(pa.table({key: pa.array(sorted(folder.done), pa.string())}), path / "done.parquet")
    return CheckpointConfig(key, str(path), delete_checkpoint_on_success=False)
