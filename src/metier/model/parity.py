"""Whether a model says what another says: logits over the same ids, and what rounding does.

How much rounding changes a logit depends on the model. So it is measured: the output of each module
of the reference is moved at random by the size of one rounding in its number format, and the
largest change of a logit that follows is the *noise*. Two forms of one model that differ in
rounding alone (an adapter beside its base, or merged into it) differ by about that much
(`docs/log.md`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from metier.errors import ModelError
from metier.model.backbone import inner
from metier.model.decoder import Ids, evaluating
from metier.model.merge import unit_roundoff
from metier.model.seq2seq import forced_inputs, is_seq2seq

BOUND = 4.0
"""Logits may differ by this many times the noise."""
# Logits kept of the reference, and written by a model in another process: 2^26 float32 are 256 MB.
_KEPT = 1 << 26


@dataclass(frozen=True)
class Forced:
    """A prompt and the answer that every form of the model is made to read.

    Attributes:
        prompt: its ids.
        answer: ids that the reference wrote.
        kept: of how many of them, from the first, the logits are compared.

    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kept: int

    @property
    def ids(self) -> list[int]:
        """What is read: behind the last `kept` of these stand the logits compared."""
        return [*self.prompt, *self.answer[: self.kept - 1]]


class Reference:
    """What the reference says: its logits, their noise, and how sure it is of each token.

    Attributes:
        rows: what was read.
        noise: largest change of a logit by one rounding of each module's output.
        largest: largest absolute logit.

    """

    def __init__(self, model: Any, rows: Sequence[Forced], advance: Callable[[], None]) -> None:
        self.rows = tuple(rows)
        self._logits: list[torch.Tensor] = []
        self._gaps: list[list[float]] = []
        for row in rows:
            every = Forced(row.prompt, row.answer, len(row.answer))
            found = logits(model, every)
            top = found.topk(2).values
            self._gaps.append((top[:, 0] - top[:, 1]).tolist())
            self._logits.append(found[: row.kept].clone())
            advance()
        self.largest = max(float(found.abs().max()) for found in self._logits)
        self.noise = self._noise(model, advance)

    @property
    def bound(self) -> float:
        """Largest difference of a logit that rounding explains."""
        return BOUND * self.noise

    @property
    def size(self) -> int:
        """Bytes of the logits that are compared."""
        return sum(found.nbytes for found in self._logits)

    def difference(self, row: int, found: torch.Tensor) -> float:
        """Largest absolute difference to the logits of a row, shape (kept, vocabulary)."""
        own = self._logits[row]
        if own.shape != found.shape:
            return float("inf")
        worst = float((own - found).abs().max())
        return float("inf") if math.isnan(worst) else worst

    def is_tie(self, row: int, token: int) -> bool:
        """Whether one rounding may decide which token the reference writes there."""
        return self.gap(row, token) <= self.noise

    def gap(self, row: int, token: int) -> float:
        """How far the likeliest token is ahead of the next, in logits; inf behind the answer."""
        gaps = self._gaps[row]
        return gaps[token] if token < len(gaps) else float("inf")

    def _noise(self, model: Any, advance: Callable[[], None]) -> float:
        unit = unit_roundoff(model.dtype)
        found = unit * self.largest
        with _rounded_once_more(model, unit):
            for number, row in enumerate(self.rows):
                found = max(found, self.difference(number, logits(model, row)))
                advance()
        if not math.isfinite(found):
            raise ModelError("model", "gives logits that are no numbers", "train it again")
        return found


def kept(answers: Sequence[Ids], vocabulary: int) -> list[int]:
    """Of how many tokens of each answer the logits are kept: all where there is memory for them."""
    most = max(1, _KEPT // (vocabulary * max(1, len(answers))))
    return [min(len(answer), most) for answer in answers]


def logits(model: Any, row: Forced) -> torch.Tensor:
    """Logits of the tokens of an answer, each behind those before it; float32 on the processor.

    Returns:
        shape (kept, vocabulary).

    """
    if is_seq2seq(model):
        inputs = forced_inputs(model, row.ids, row.kept)
    else:
        ids = torch.tensor([row.ids], device=model.device)
        inputs = {"input_ids": ids, "logits_to_keep": row.kept}
    with evaluating(model):
        found: torch.Tensor = model(**inputs).logits
    return found[0].float().cpu()


@contextlib.contextmanager
def _rounded_once_more(model: Any, unit: float) -> Iterator[None]:
    """Move the output of each module by up to `unit` times its root mean square, at random."""
    generator = torch.Generator().manual_seed(0)

    def move(_module: Any, _inputs: Any, output: Any) -> Any:
        if not (isinstance(output, torch.Tensor) and output.is_floating_point()):
            return None
        size = output.float().pow(2).mean(-1, keepdim=True).sqrt()
        random = torch.rand(output.shape, generator=generator).to(output.device)
        return (output + unit * size * (2 * random - 1)).to(output.dtype)

    leaves = [module for module in inner(model).modules() if not list(module.children())]
    hooks = [module.register_forward_hook(move) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
