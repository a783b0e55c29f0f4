"""What a base with an encoder and a decoder cannot be, said before anything is loaded.

Forgetting is measured by how a model goes on with general text, and rehearsed on text that it
writes out of nothing. An encoder-decoder was trained to do neither: T5 fills gaps, Flan-T5 answers.
How its decoder fares there could get better while what it was trained for gets lost, so nothing is
measured, and nothing is said to have been kept.
"""

from __future__ import annotations

from metier.errors import ConfigError
from metier.model.load import is_encoder_decoder
from metier.progress import Progress
from metier.recipes.workbench import Workbench
from metier.task import Arm, Training

UNMEASURED = (
    "what it forgot was not measured: its base is an encoder-decoder, which does not go on with "
    "general text, and there is no rehearsal for it"
)
_CAUSAL = "choose a causal (decoder-only) base"


def check(bench: Workbench, progress: Progress) -> None:
    """Refuse arms that encoder-decoders cannot have, and say what is left out.

    Raises:
        ConfigError: an arm or a setting needs a causal base.
        ModelError: a base is missing.

    """
    arms = [arm for arm in bench.task.chosen_arms() if arm.method not in ("classical", "remote")]
    bases = [name for name in bench.task.bases() if arms and is_encoder_decoder(name)]
    for name in bases:
        for arm in arms:
            _check_arm(arm, bench.task.training, name)
    if bases and bench.task.training.rehearsal and any(arm.may_forget for arm in arms):
        progress.say(
            f"note: training.rehearsal is left out for {', '.join(bases)}, and what is forgotten "
            "is not measured: an encoder-decoder does not go on with general text"
        )


def may_forget(bench: Workbench, arm: Arm) -> bool:
    """Whether what an arm forgets is measured, and rehearsed against."""
    name = arm.base or bench.task.bases()[0]
    return arm.may_forget and not is_encoder_decoder(name)


def _check_arm(arm: Arm, training: Training, base: str) -> None:
    """Refuse one arm over an encoder-decoder."""
    place = f"arm '{arm.name}'"
    if arm.headed:
        raise _refusal(place, "puts a head on a causal language model", base, "use lora or full")
    if arm.tuning is None:
        return
    if "virtual_tokens" in arm.tuning.reads:
        cause = "puts virtual tokens before the rows of a causal language model"
        raise _refusal(place, cause, base, "use lora instead")
    if arm.tuning.four_bit:
        raise _refusal(place, "holds a causal language model in four bits", base, "use lora")
    for field in ("layers", "added_tokens", "shard"):
        if getattr(training, field):
            cause = "is for causal language models"
            raise _refusal(f"training.{field}", cause, base, "leave it out")


def _refusal(place: str, cause: str, base: str, remedy: str) -> ConfigError:
    return ConfigError(
        place, f"{cause}, and base '{base}' is an encoder-decoder", f"{remedy}, or {_CAUSAL}"
    )
