"""Merge an adapter into its base: least error, and each layer checked as it is merged.

The sum of base and adapter is made in float64 and cast to the format of the base. So a merged
float32 weight is the nearest number to the sum, and a bfloat16 weight the nearest to the sum in
float32 (PyTorch casts in two steps, which costs 2^-16 of a rounding): a merge in the format itself
rounds the adapter's product, too. A layer is moved to the processor for that (not every device has
float64), one at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from metier.errors import ModelError
from metier.model.backbone import inner
from metier.progress import Progress

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PROBES = 8
_SLACK = 1.01
"""Room for the float64 products of the check and for second-order terms of the bound."""
_REMEDY = "export the adapter alone, without --merge, or serve it with 'metier serve'"


@dataclass(frozen=True)
class Merged:
    """A base that its adapter was merged into.

    Attributes:
        model: the Transformers model, nothing of PEFT left in it.
        layers: names of the layers that were merged.
        error: largest deviation of a merged layer from the adapted one, as a share of what one
            rounding of its weights explains; at most 1.
        before: digests of the base's weights.
        after: digests of the model's weights.

    """

    model: PreTrainedModel
    layers: tuple[str, ...]
    error: float
    before: dict[str, str]
    after: dict[str, str]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to a format: 2^-24 for float32, 2^-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2


def merge(model: PeftModel, progress: Progress) -> Merged:
    """Merge the adapter of a model into its base, in place; one that is refused is of no more use.

    Each layer is asked for the same random inputs before and after. With weights W' = W + D rounded
    to nearest, |W'x - (W + D)x| <= u |W'||x| for the unit roundoff u (Higham, *Accuracy and
    Stability of Numerical Algorithms*, 2002, section 3.1); a layer beyond that was merged wrongly.

    Raises:
        ModelError: the adapter is of a kind that cannot be merged, is not finite, changes more
            than its own layers, or a merged layer answers otherwise than the adapted one.

    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind: Any = model.peft_config["default"]
    if kind.is_prompt_learning:
        raise ModelError(
            f"adapter of kind {kind.peft_type.value}",
            "puts tokens of its own before each input: there is nothing to merge into weights",
            _REMEDY,
        )
    language_model: Any = inner(model)
    before = digests(model)
    layers = {n: m for n, m in language_model.named_modules() if isinstance(m, BaseTunerLayer)}
    progress.stage("merge the adapter", len(layers))
    error = 0.0
    for name, layer in layers.items():
        error = max(error, _merge_layer(name, layer))
        progress.advance()
    whole = model.unload()
    merged = Merged(whole, tuple(layers), error, before, digests(whole))
    _check_untouched(merged)
    return merged


def digests(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """SHA-256 of the bytes of each weight and buffer, those of an adapter left out, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    language_model: Any = inner(model)
    layers = [n for n, m in language_model.named_modules() if isinstance(m, BaseTunerLayer)]
    found = {}
    for name, tensor in language_model.state_dict().items():
        layer = next((one for one in layers if name.startswith(f"{one}.")), None)
        if layer is None or name.startswith(f"{layer}.base_layer."):
            found[name.replace(".base_layer.", ".")] = _digest(tensor)
    return found


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).hexdigest()


def _merge_layer(name: str, layer: Any) -> float:
    """Merge one layer; returns its deviation as a share of what rounding explains."""
    base = layer.get_base_layer()
    device, dtype = base.weight.device, base.weight.dtype
    layer.to("cpu", torch.float64)
    inputs = _probes(name, base)
    with torch.inference_mode():
        expected = layer(inputs)
    try:
        layer.merge(safe_merge=True)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"layer {name}", f"cannot be merged ({error})", _REMEDY) from None
    base.to(dtype).to(torch.float64)
    with torch.inference_mode():
        share = _deviation(base, inputs, expected, unit_roundoff(dtype))
    base.to(dtype).to(device)
    if not share <= 1:  # also where it is not a number
        raise ModelError(
            f"layer {name}",
            f"answers otherwise once it is merged: {share:,.1f} times what rounding explains",
            _REMEDY,
        )
    return share


def _probes(name: str, base: Any) -> torch.Tensor:
    """Random inputs of a linear layer, shape (probes, inputs)."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(base, torch.nn.Linear | Conv1D):
        raise ModelError(
            f"layer {name}", f"is a {type(base).__name__}, which cannot be merged", _REMEDY
        )
    width = base.weight.shape[0 if isinstance(base, Conv1D) else 1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_PROBES, width, generator=generator, dtype=torch.float64)


def _deviation(base: Any, inputs: torch.Tensor, expected: torch.Tensor, unit: float) -> float:
    """Largest difference of a layer's outputs to those expected, as a share of the bound."""
    found = base(inputs)
    weight, bias = base.weight.clone(), base.bias
    base.weight.data.abs_()
    explained = base(inputs.abs()) if bias is None else base(inputs.abs()) - bias + bias.abs()
    base.weight.data.copy_(weight)
    smallest = torch.finfo(torch.float64).tiny
    return float(((found - expected).abs() / (_SLACK * unit * explained + smallest)).max())


def _check_untouched(merged: Merged) -> None:
    """Refuse a merge that changed a weight outside the adapter's layers."""
    before, after = merged.before, merged.after
    own = {f"{layer}.{kind}" for layer in merged.layers for kind in ("weight", "bias")}
    changed = [
        name
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in own
    ]
    if changed:
        raise ModelError(
            f"weight {changed[0]}",
            "was changed by the merge, though the adapter does not stand on it (tied weights?)",
            _REMEDY,
        )
