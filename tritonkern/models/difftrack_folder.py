"""What `DiffTrack` reads from a folder as diffusers writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritonkern._optional import how_to_install
from tritonkern.files import atomic_path
from tritonkern.models.checkpoints import read_state_dict
from tritonkern.models.cogvideox import CogVideoX
from tritonkern.models.hunyuan import HunyuanVideo

PROMPT = "prompt_embeds.safetensors"
_HUNYUAN = "HunyuanVideoTransformer3DModel"


class StraightPath:
    """The noise of flow matching, by the method of diffusers' other schedulers."""

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - s) latents + s noise at timesteps `[B]`, 1000 s."""
        s = (timesteps / 1000).to(latents).view(-1, *(1,) * (latents.ndim - 1))
        return (1 - s) * latents + s * noise


def read_folder(folder: Path) -> tuple[CogVideoX | HunyuanVideo, Any, Any, Tensor]:
    """Transformer, VAE, scheduler (None where the folder has none) and the embedding of the empty prompt `[1, L, C]`.

    Raises as `DiffTrack.from_folder`.
    """
    hunyuan = _config(folder / "transformer").get("_class_name") == _HUNYUAN
    if hunyuan:
        # All of it is diffusers' own; the text encoder, which makes the prompt, is not run here.
        prompt, pooled = _stored_prompt(folder / PROMPT, 2)
        transformer: CogVideoX | HunyuanVideo = HunyuanVideo.from_folder(folder, pooled)
    else:
        transformer = CogVideoX.from_folder(folder)
    if not (folder / "vae" / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vae/config.json; give a whole folder that diffusers wrote")
    if isinstance(transformer, CogVideoX):
        prompt = _empty_prompt(folder, transformer.max_text)
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the VAE of {folder} needs the package {error.name}: {how_to_install('diffusers')}", name=error.name
        ) from error
    make = diffusers.AutoencoderKLHunyuanVideo if hunyuan else diffusers.AutoencoderKLCogVideoX
    from safetensors import SafetensorError

    try:
        vae = make.from_pretrained(folder, subfolder="vae")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights of {folder / 'vae'} cannot be read: {error}") from error
    scheduler: Any = StraightPath() if hunyuan else None
    name = _config(folder / "scheduler").get("_class_name")
    if not hunyuan and name is not None:
        scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    return transformer, vae, scheduler, prompt


def _config(folder: Path) -> dict[str, Any]:
    """The content of the configuration of one part, or nothing where there is none that can be read."""
    path = next((folder / name for name in ("config.json", "scheduler_config.json") if (folder / name).is_file()), None)
    try:
        content = {} if path is None else json.loads(path.read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _stored_prompt(path: Path, count: int) -> list[Tensor]:
    """The tensors of the file of the prompt: the embedding `[1, L, C]`, and with two the pooled one `[1, C]`."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: it must hold prompt_embeds and pooled_prompt_embeds, which the pipeline of "
            "HunyuanVideo makes by encode_prompt('')"
        )
    state = read_state_dict(path)
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    names = ("prompt_embeds", "pooled_prompt_embeds")[:count]
    if count == 1 and len(state) == 1:
        names = tuple(state)
    if set(state) != set(names) or any(state[name].ndim != 3 - i for i, name in enumerate(names)):
        wanted = "one tensor [1, L, C]" if count == 1 else "prompt_embeds [1, L, C] and pooled_prompt_embeds [1, C]"
        raise ValueError(f"{path} must hold {wanted}, got {shapes}")
    return [state[name].float() for name in names]


def _empty_prompt(folder: Path, length: int) -> Tensor:
    """The embedding of the empty prompt of CogVideoX `[1, L, C]`."""
    path = folder / PROMPT
    if path.is_file():
        return _stored_prompt(path, 1)[0]
    if not ((folder / "text_encoder").is_dir() and (folder / "tokenizer").is_dir()):
        raise FileNotFoundError(
            f"{folder} holds neither {PROMPT}, the embedding of the empty prompt, nor the folders text_encoder and "
            "tokenizer, from which it is made once; add one or the other"
        )
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(folder / "tokenizer")(
        "", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        embedding = encoder(tokens.input_ids)[0].float()
    with atomic_path(path) as part:
        save_file({"prompt_embeds": embedding.contiguous()}, part)
    return embedding
