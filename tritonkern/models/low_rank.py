"""Low-rank adapters (LoRA) on linear layers of a transformer, and the file in which DiTracker publishes its own.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022. With W `[out, in]` of a frozen layer, A
`[r, in]` and B `[out, r]`, the layer computes

    y = W x + b + alpha / r  B A x

B starts at zero, so that a new adapter changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonkern.files import atomic_path
from tritonkern.models.checkpoints import read_state_dict, shortened, unusable
from tritonkern.nn._plain import is_plain, obstacle

RANK, ALPHA = 128, 64.0
"""Of DiTracker."""
_SIDES = ".lora_A.weight", ".lora_B.weight"
# What the training script and peft put before the names of layers. A file may lack either.
_PREFIXES = "transformer.", "base_model.model."


class LowRankLinear(nn.Linear):
    """A linear layer with an adapter, which keeps the layer's weight and bias under their names.

    Args:
        layer: a plain `nn.Linear`. Its parameters are shared, not copied.
        rank: of the adapter, r.
        alpha: the adapter's product is multiplied by alpha / r.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.factor = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x)) * self.factor

    def merged(self) -> nn.Linear:
        """The plain layer of weight `W + alpha / r B A`, which is computed in float32 or more and then rounded."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        a, b, weight = (x.detach().to(dtype) for x in (self.lora_A.weight, self.lora_B.weight, self.weight))
        layer.weight = nn.Parameter((weight + self.factor * (b @ a)).to(self.weight), self.weight.requires_grad)
        layer.bias = self.bias
        return layer


def project_rows(layer: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """`layer(x)[..., rows]`; nothing else is computed of a plain linear layer, with or without an adapter.

    Any other layer, such as one with hooks, is called.
    """
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear):
        return _some_rows(layer, x, rows)
    if isinstance(layer, LowRankLinear) and is_plain(layer, LowRankLinear) and is_plain(layer.lora_B, nn.Linear):
        return _some_rows(layer, x, rows) + _some_rows(layer.lora_B, layer.lora_A(x), rows) * layer.factor
    return layer(x)[..., rows]


def _some_rows(layer: nn.Linear, x: Tensor, rows: Tensor) -> Tensor:
    return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def attention_targets(last: int) -> list[str]:
    """Names of the layers that DiTracker adapts: all four of the attentions before block `last`, and its q and k.

    Block 17 of CogVideoX-2B makes 70 layers, 34,406,400 parameters at rank 128.
    """
    before = [f"{index}.attn1.{part}" for index in range(last) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    return [f"transformer_blocks.{name}" for name in (*before, f"{last}.attn1.to_q", f"{last}.attn1.to_k")]


def add_low_rank(transformer: nn.Module, targets: Sequence[str], rank: int = RANK, alpha: float = ALPHA) -> None:
    """Puts new adapters on layers of `transformer`, in place, and freezes all its other parameters.

    Args:
        transformer: such as `CogVideoX`.
        targets: names of its linear layers, such as `attention_targets(17)`.
        rank: of the adapters, at least 1.
        alpha: their products are multiplied by alpha / rank.

    Raises:
        ValueError: `rank` below 1, or a target that is not a plain linear layer, or has an adapter already.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}")
    layers = dict(transformer.named_modules())
    for name in targets:
        if name not in layers:
            raise ValueError(f"targets must be layers of the transformer; it has none called {name!r}")
        if isinstance(layers[name], LowRankLinear):
            raise ValueError(f"targets: {name} has an adapter already")
        if (reason := obstacle(layers[name], nn.Linear)) is not None:
            raise ValueError(f"targets must be plain linear layers; {name} is none: {reason}")
    for name in dict.fromkeys(targets):
        transformer.set_submodule(name, LowRankLinear(cast(nn.Linear, layers[name]), rank, alpha))
    transformer.requires_grad_(False)
    for parameter in low_rank_parameters(transformer):
        parameter.requires_grad_(True)


def low_rank_layers(transformer: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """The layers with adapters, by name."""
    return ((name, x) for name, x in transformer.named_modules() if isinstance(x, LowRankLinear))


def low_rank_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters, A and B in turn, for an optimizer."""
    sides = (side for _, layer in low_rank_layers(transformer) for side in (layer.lora_A, layer.lora_B))
    return [parameter for side in sides for parameter in side.parameters()]


def merge_low_rank(transformer: nn.Module) -> None:
    """Replaces every layer with an adapter by the plain layer of weight `W + alpha / r B A`, for inference."""
    for name, layer in list(low_rank_layers(transformer)):
        transformer.set_submodule(name, layer.merged())


def save_low_rank(transformer: nn.Module, path: str | Path) -> None:
    """Writes the adapters as safetensors, by the names of the published file.

    These are ``transformer.base_model.model.{layer}.lora_A.weight`` and ``.lora_B.weight``. Alpha is not in the file.

    Raises:
        ValueError: there are no adapters.
    """
    from safetensors.torch import save_file

    state = {
        "".join(_PREFIXES) + name + side: x.weight.detach().contiguous()
        for name, layer in low_rank_layers(transformer)
        for side, x in zip(_SIDES, (layer.lora_A, layer.lora_B), strict=True)
    }
    if not state:
        raise ValueError("transformer has no adapters: add_low_rank puts them on")
    with atomic_path(path) as part:
        save_file(state, part, metadata={"format": "pt"})


def load_low_rank(transformer: nn.Module, path: str | Path, targets: Sequence[str], alpha: float = ALPHA) -> None:
    """Puts the adapters of a file on layers of `transformer`; nothing is changed if the file does not fit.

    Args:
        transformer: as in `add_low_rank`.
        path: a file as `save_low_rank` writes it, or peft, whose names lack ``transformer.``. Rank is that of the file.
        targets: the layers that the file must have adapters of, no more and no less.
        alpha: the products are multiplied by alpha / r. It is not in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or adapters are missing, unexpected, halves of a pair, of several ranks, or of
            another shape than the layer needs; the message names them.
    """
    pairs = _pairs(read_state_dict(path), str(path))
    for kind, names in (
        ("lacks", [name for name in targets if name not in pairs]),
        ("has, which are not expected,", [name for name in pairs if name not in targets]),
    ):
        if names:
            raise ValueError(f"{path} {kind} adapters of {len(names)} layers: {shortened(names)}")
    layers = dict(transformer.named_modules())
    ranks = Counter(a.shape[0] for a, _ in pairs.values())
    rank = ranks.most_common(1)[0][0]
    wrong = []
    for name, pair in pairs.items():
        layer = layers.get(name)
        if isinstance(layer, nn.Linear):
            needed = (rank, layer.in_features), (layer.out_features, rank)
            for side, value, shape in zip(_SIDES, pair, needed, strict=True):
                if value.shape != shape:
                    wrong.append(f"{name}{side} {list(value.shape)} (needs {list(shape)})")
    if wrong:
        raise ValueError(f"{path} does not fit: {len(wrong)} tensors are of another shape: {shortened(wrong)}")
    add_low_rank(transformer, targets, rank, alpha)
    with torch.no_grad():
        for name, layer in low_rank_layers(transformer):
            if name in pairs:
                for target, value in zip((layer.lora_A, layer.lora_B), pairs[name], strict=True):
                    target.weight.copy_(value)


def _pairs(state: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by the name of the layer."""
    found: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, value in state.items():
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        side = next((side for side in _SIDES if name.endswith(side)), None)
        if side is None or value.ndim != 2 or 0 in value.shape or unusable(value):
            foreign.append(key)
        elif side in found.setdefault(name.removesuffix(side), {}):
            raise ValueError(f"{source} holds {name} twice, with and without a prefix")
        else:
            found[name.removesuffix(side)][side] = value
    if foreign:
        raise ValueError(
            f"{source} holds {len(foreign)} tensors that are not matrices of adapters called "
            f"{''.join(_PREFIXES)}LAYER.lora_A.weight or .lora_B.weight: {shortened(foreign)}"
        )
    halves = [name + side for name, pair in found.items() if len(pair) == 1 for side in pair]
    if halves:
        found_halves = f"{len(halves)} halves of a pair (A without B or B without A): {shortened(halves)}"
        raise ValueError(f"{source} holds {found_halves}")
    return {name: (pair[_SIDES[0]], pair[_SIDES[1]]) for name, pair in found.items()}
