"""Supervised fine-tuning: learn the answers, full or with an adapter.

The loss is next-token cross-entropy on the answer and its stop token only. The model is trained
in place and keeps the parameters that wrote the fewest tokens of the validation answers wrong: its
loss there rises again while it still learns, as it grows too sure of itself (`docs/log.md`). With
`classify.head_loss` the same loop trains a classification head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metier.errors import DivergedError
from metier.model.encoder import is_encoder
from metier.model.world import World
from metier.progress import Progress, Silent
from metier.task import Training, Tuning
from metier.training.batches import Batch, Row, RowBatches, cut
from metier.training.loop import Loop, Plan, State, cosine
from metier.training.losses import next_tokens
from metier.training.optimizers import adamw
from metier.training.scoring import Scorer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

    Model = PreTrainedModel | PeftModel

Judge = Callable[[Batch], tuple[float, ...]]
"""Sum of the losses over a batch's trained tokens; where answers can be counted, how many of them
would be written wrong; and that of how many, where not of the trained tokens."""

MICRO_TOKENS = 2048
"""Tokens that are trained on at once."""

# Of LoRA on a model 2,000 wide; "LoRA Without Regret" (Schulman et al. 2025) found the exponent on
# Llamas, this optimum, and ten times the rate of full tuning.
_RATE, _RATE_WIDTH, _RATE_EXPONENT = 5e-4, 2000, -0.78
# Of all weights of an encoder: 5e-5 for BERT-base, as its authors found (arXiv 1810.04805, A.3).
_WHOLE_ENCODER = 0.3
_CHECKPOINT_SECONDS = 10.0


def fit(
    model: torch.nn.Module,
    loss: Callable[[Batch], Tensor],
    train: Sequence[Row],
    validation: Sequence[Row],
    training: Training,
    *,
    learning_rate: float,
    seed: int,
    head_rate: float | None = None,
    judge: Judge | None = None,
    also: Callable[[int], Tensor] | None = None,
    directory: Path | None = None,
    part: float = 1.0,
    world: World | None = None,
    progress: Progress | None = None,
) -> State:
    """Train the parameters of `model` that require gradients, with AdamW and a cosine.

    Args:
        model: frozen weights may be in bfloat16.
        loss: summed over a batch: `answer_loss` of the model, or `classify.head_loss`.
        train: rows, checked by `preflight.prepare`.
        validation: rows on which early stopping decides, once a pass.
        training: epochs, batch size, schedule, patience.
        learning_rate: peak.
        seed: of the order and of dropout.
        head_rate: peak of a head alone, where it has one of its own.
        judge: of the validation part; without one, the lowest loss chooses the parameters.
        also: what every step adds to its mean loss, such as a `rehearsal.loss`.
        directory: receives checkpoints and the log; an interrupted run goes on from there.
        part: of its steps, after which it is paused, to go on in the same directory later.
        world: the processes that share the work.
        progress: is told every step.

    Returns:
        steps, seconds, best loss, learning curve; of a paused training with its loss now.

    Raises:
        DivergedError: the gradient was not finite three times in a row, or no validation loss was.
        TrainingError: memory does not suffice for the longest rows.

    """
    batches = row_batches(train, training, seed=seed)
    plan = _plan(batches.steps_per_epoch, training, seed)
    world = world or World()
    loop = Loop(
        model,
        loss,
        batches,
        [adamw(model, learning_rate, training.weight_decay, head_rate)],
        plan,
        also=also,
        directory=directory,
        evaluate=_looked_at(validation, judge or unjudged(loss), world),
        hardest=cut(train, MICRO_TOKENS)[0],
        world=world,
        progress=progress or Silent(),
    )
    return _run(loop, math.ceil(part * plan.steps), looks=bool(validation))


def _run(loop: Loop[Batch], until: int, *, looks: bool) -> State:
    """Train up to a step; `looks` where validation rows choose the parameters."""
    state = loop.run(until)
    if not state.finished:
        state = _with_now(state, loop.figures())
    if looks:
        _check_finite(state)
    return state


def _looked_at(
    rows: Sequence[Row], judge: Judge, world: World
) -> Callable[[], dict[str, float]] | None:
    """The evaluation of validation rows, if there are any."""
    return evaluation(cut(rows, MICRO_TOKENS), judge, world) if rows else None


def _with_now(state: State, figures: Mapping[str, float]) -> State:
    """Where a paused training stands, its parameters of now among those that may be best."""
    mistakes, loss = figures.get("validation_mistakes", 0.0), figures.get("loss", math.inf)
    if not (mistakes, loss) < (state.best_mistakes, state.best_loss):
        return state
    return replace(state, best_mistakes=mistakes, best_loss=loss, best_step=state.step)


def _check_finite(state: State) -> None:
    """Refuse parameters that were chosen by nothing."""
    if not math.isfinite(state.best_loss):
        raise DivergedError(
            "validation part",
            f"its loss was never a finite number in {state.step:,} steps",
            "lower training.learning_rate, or look whether the base gives numbers at all",
        )


def evaluation(
    held_out: Sequence[Batch], judge: Judge, world: World
) -> Callable[[], dict[str, float]]:
    """Means over the trained tokens of some rows, of which there is one at least.

    They are ``loss`` and, where the judge counts them, ``validation_mistakes``.
    """
    weight = sum(part.weight for part in held_out)

    def figures() -> dict[str, float]:
        judged = [
            [counts * found for found in judge(part)] for _, part, counts in world.share(held_out)
        ]
        sums = world.total(*map(sum, zip(*judged, strict=True)))
        loss, *counted = sums
        if not counted:
            return {"loss": loss / weight}
        mistakes, most = (*counted, weight)[:2]
        return {"loss": loss / weight, "validation_mistakes": mistakes / max(most, 1)}

    return figures


def unjudged(loss: Callable[[Batch], Tensor]) -> Judge:
    """The loss alone chooses."""
    return lambda batch: (loss(batch).item(),)


def default_learning_rate(model: Model, tuning: Tuning) -> float:
    """Peak learning rate for a base of this width and a way of updating it."""
    return rate_of(model.config, tuning)


def rate_of(config: PretrainedConfig, tuning: Tuning) -> float:
    """The same, from the base's config alone."""
    whole = not tuning.adapter and is_encoder(config)
    return tuning.rate * (_WHOLE_ENCODER if whole else 1) * _width_rate(config)


def encoder_head_rate(model: Model) -> float:
    """Peak learning rate of a head on an encoder: it starts from nothing, so it learns as LoRA."""
    return _width_rate(model.config)


def _width_rate(config: PretrainedConfig) -> float:
    width: int = config.get_text_config().hidden_size
    rate: float = _RATE * (width / _RATE_WIDTH) ** _RATE_EXPONENT
    return rate


def _plan(steps_per_epoch: int, training: Training, seed: int) -> Plan:
    steps = steps_per_epoch * training.epochs
    return Plan(
        steps=steps,
        schedule=cosine(steps, training.warmup),
        seed=seed,
        evaluate_every=steps_per_epoch,
        patience=training.patience,
        checkpoint_seconds=_CHECKPOINT_SECONDS,
    )


def row_batches(rows: Sequence[Row], training: Training, *, seed: int) -> RowBatches:
    """The steps that `training` makes of rows."""
    return RowBatches(rows, step_rows=training.batch_size, micro_tokens=MICRO_TOKENS, seed=seed)


def answer_loss(score: Scorer) -> Callable[[Batch], Tensor]:
    """Sum of cross-entropies over a batch's trained tokens."""

    def loss(batch: Batch) -> Tensor:
        batch = batch.to(score.device)
        trained = batch.targets >= 0
        return score(batch.ids, batch.lengths, trained, next_tokens(batch.targets[trained]))

    return loss


def answer_judge(score: Scorer) -> Judge:
    """Of what a batch is to learn: sum of cross-entropies, and tokens it would write wrong."""

    def judge(batch: Batch) -> tuple[float, float]:
        batch, mistakes = batch.to(score.device), 0
        trained = batch.targets >= 0
        targets = batch.targets[trained]
        cross_entropy = next_tokens(targets)

        def counted(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            nonlocal mistakes
            mistakes += int((logits.argmax(-1) != targets[rows]).sum())
            return cross_entropy(logits, rows)

        loss = score(batch.ids, batch.lengths, trained, counted).item()
        return loss, mistakes

    return judge
