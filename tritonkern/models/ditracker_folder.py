"""What `DiTracker.from_folder` reads: the published weights, and the CogVideoX-2B that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, cast

import torch

from tritonkern.models.checkpoints import load_strict, read_state_dict
from tritonkern.models.cogvideox import CogVideoX, unloaded
from tritonkern.models.difftrack_folder import read_folder
from tritonkern.models.ditracker import DiTrackerHead
from tritonkern.models.ditracker_encoder import DiTrackerEncoder
from tritonkern.models.low_rank import attention_targets, load_low_rank, merge_low_rank

HEAD, ADAPTERS, SETTINGS = "model.pth", "pytorch_lora_weights.safetensors", "ditracker.json"
_BACKBONE = "CogVideoX-2b"


class Backbone(NamedTuple):
    """The transformer that the weights were trained on, and the layer and head that they read."""

    num_heads: int
    head_dim: int
    layers: int
    rotary: bool
    layer: int
    head: int


PUBLISHED = Backbone(30, 64, 30, False, 17, 2)


def read_ditracker(folder: Path, official: bool, merge: bool) -> tuple[DiTrackerEncoder, DiTrackerHead]:
    """Encoder and head. Raises as `DiTracker.from_folder`."""
    missing = [name for name in (HEAD, ADAPTERS) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no {' and no '.join(missing)}; DiTracker's checkpoint has both")
    # The small files first: what is wrong with them is then known before gigabytes are read.
    with torch.device("meta"):
        head = DiTrackerHead()
    load_strict(head, read_state_dict(folder / HEAD), str(folder / HEAD))
    source = _backbone(folder)
    _check(unloaded(source)[0], source)
    transformer, vae, _, prompt = read_folder(source)
    transformer = cast(CogVideoX, transformer)
    # Nothing behind the layer is computed.
    transformer.transformer_blocks = transformer.transformer_blocks[: PUBLISHED.layer + 1]
    load_low_rank(transformer, folder / ADAPTERS, attention_targets(PUBLISHED.layer))
    if merge:
        merge_low_rank(transformer)
    vae.requires_grad_(False)
    if official:
        vae.enable_slicing()
        vae.enable_tiling()
    encoder = DiTrackerEncoder(
        transformer,
        vae,
        layer=PUBLISHED.layer,
        head=PUBLISHED.head,
        prompt=prompt,
        sample=official,
        generator=torch.Generator().manual_seed(0) if official else None,
    )
    return encoder, head


def _backbone(folder: Path) -> Path:
    """The folder of CogVideoX-2B: named in ditracker.json, or in `folder`, or beside it."""
    settings = folder / SETTINGS
    if settings.is_file():
        try:
            content = json.loads(settings.read_text())
        except ValueError as error:
            raise ValueError(f"{settings} is not readable JSON: {error}") from error
        if not isinstance(content, dict) or set(content) != {"cogvideox"} or not isinstance(content["cogvideox"], str):
            raise ValueError(f'{settings} must be {{"cogvideox": "PATH"}}, a folder of CogVideoX-2B, got {content!r}')
        named = folder / content["cogvideox"]
        if not named.is_dir():
            raise FileNotFoundError(f"{settings} names the folder {named}, which does not exist")
        return named
    if (folder / "transformer").is_dir():
        return folder
    for place in (folder, folder.absolute().parent):
        for found in sorted(place.iterdir()):
            if found.is_dir() and found.name.lower() == _BACKBONE.lower():
                return found
    raise FileNotFoundError(
        f"there is no folder {_BACKBONE} in {folder} or beside it, and no {settings} with its path: "
        '{"cogvideox": "PATH"}'
    )


def _check(transformer: CogVideoX, source: Path) -> None:
    found = {
        "num_heads": transformer.num_heads,
        "head_dim": transformer.head_dim,
        "layers": len(transformer.transformer_blocks),
        "rotary": transformer.rotary,
    }
    wrong = [f"{name} {value} (needs {getattr(PUBLISHED, name)})" for name, value in found.items()
             if value != getattr(PUBLISHED, name)]  # fmt: skip
    if wrong:
        raise ValueError(f"{source} holds another transformer than DiTracker's CogVideoX-2B: {', '.join(wrong)}")
