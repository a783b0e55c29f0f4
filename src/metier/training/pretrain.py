"""Pre-training on streamed text: a base from random weights, or one that is trained further.

The stages meet as files in the run directory: ``tokenizer-*`` (of a new base), ``tokens-*`` and
``held-out-*`` of each source, ``training-*`` (checkpoints and log) and at last ``model-*`` in
Hugging Face layout. Of several processes that torchrun starts, the first makes the stages, and all
share the training. Left out on purpose: other architectures of new bases.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metier import runs
from metier.data import stream
from metier.errors import ConfigError, ModelError
from metier.model.backbone import context_in, context_of
from metier.model.device import choose_device
from metier.model.encoder import is_encoder
from metier.model.load import base_config, base_hash, locate
from metier.model.world import World, joined
from metier.progress import Progress, Silent
from metier.text.tokenizer import Tokenizer
from metier.training.corpus import Corpus, Read
from metier.training.held_out import (
    Bits,
    HeldOut,
    Ratio,
    bits_of,
    bits_per_byte,
    compared,
)
from metier.training.loop import Loop, Plan, State, trapezoid
from metier.training.losses import next_tokens
from metier.training.mixture import Mixture, Window
from metier.training.pretrain_config import PretrainConfig, Shape, checked
from metier.training.scoring import Scorer
from metier.training.start import Start, given_base, new_base

_EVALUATION_LENGTH = 512
# Compiling takes about a minute: only a longer run wins it back.
_WORTH_COMPILING = 5_000_000
# How long a recipe trains and looks: its checkpoints do not depend on it.
_FREE = {"tokens", "root", "checkpoint_seconds", "evaluate_every", "evaluation_windows"}


def pretrain(
    config: PretrainConfig,
    home: Path,
    out: Path,
    ratio: Ratio,
    *,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train a base and return the directory of the finished model.

    Args:
        config: the recipe.
        home: directory that paths in it are relative to.
        out: run directory; an interrupted run there goes on where it stopped.
        ratio: says how far a given base has changed on held-out text, and how sure that is.
        device: where it is trained; by default the fastest there is.
        progress: is told every step.

    Raises:
        ConfigError: the recipe cannot be followed.
        DataError: a file of the corpus cannot be read, or there is too little text.
        ModelError: the given base cannot be loaded.

    """
    base = _base_name(config, home)
    config = checked(config, context_in(base_config(base)) if base else None)
    for source in config.sources:
        stream.matching_files(source, home / config.root)
    with joined() as world:
        work = _Work(config, base, device or choose_device(), progress or Silent(), world)
        return work.make(home / config.root, out, ratio) if world.first else work.help()


@dataclass(frozen=True)
class _Work:
    """What one process has to do for a recipe.

    Attributes:
        config: the recipe.
        base: name of the given base.
        device: where it is trained.
        progress: is told every step, by the first process.
        world: the processes that share the training.

    """

    config: PretrainConfig
    base: str | None
    device: torch.device
    progress: Progress
    world: World

    def make(self, root: Path, out: Path, ratio: Ratio) -> Path:
        """Make every stage, or find it made, as the first process."""
        config, base = self.config, self.base
        identity = base_hash(base) if base else None
        with runs.Run(out) as run:
            corpus = Corpus.of(run, config, root, self.progress)
            tokenizer_dir = locate(base) if base else corpus.tokenizer(config.shape or Shape())
            tokenizer = Tokenizer.load(tokenizer_dir)
            read = {source.name: corpus.read(source) for source in config.sources}
            files = [
                corpus.tokens(source, tokenizer, read[source.name].left)
                for source in config.trained
            ]
            about = {
                "config": config.model_dump(mode="json"),
                "files": corpus.files,
                "tokenizer": tokenizer.fingerprint,
                "base": identity,
            }

            def make(directory: Path) -> None:
                scratch = run.path / f"training-{_recipe_key(config, about)}"
                runs.begun(scratch, self.progress)
                paths = [str(path) for path in (tokenizer_dir, scratch, *files)]
                self.world.agree(json.dumps(paths))
                training = self._training(tokenizer_dir, scratch, files)
                training.run(directory, read, ratio if base else None)

            path = run.stage("model", about, make)
        self.world.agree(json.dumps([str(path)]))
        return path

    def help(self) -> Path:
        """Share the training of the first process, until it says what it has made."""
        while len(paths := [Path(path) for path in json.loads(self.world.agree())]) > 1:
            tokenizer_dir, scratch, *files = paths
            self._training(tokenizer_dir, scratch, files).share()
        return paths[0]

    def _training(self, tokenizer_dir: Path, scratch: Path, files: Sequence[Path]) -> _Training:
        config, device = self.config, self.device
        start = (
            given_base(config, self.base, device)
            if self.base
            else new_base(config, tokenizer_dir, device)
        )
        progress = self.progress if self.world.first else Silent()
        tokenizer = Tokenizer.load(tokenizer_dir)
        return _Training(config, start, tokenizer, files, scratch, progress, self.world)


def _base_name(config: PretrainConfig, home: Path) -> str | None:
    """Name of the given base: a path in the recipe is relative to it."""
    path = home / Path(config.base or "").expanduser()
    name = str(path.resolve()) if config.base and path.is_dir() else config.base
    if name:
        _refuse_encoders(name)
    return name


def _refuse_encoders(name: str) -> None:
    """Refuse a base that does not predict what follows."""
    config, remedy = base_config(name), "choose a causal (decoder-only) language model"
    if is_encoder(config):
        cause = "is an encoder: it predicts masked words, not what follows"
        raise ModelError(name, cause, remedy)
    if config.is_encoder_decoder:
        cause = "is an encoder-decoder, which was not trained to go on with a text"
        raise ModelError(name, cause, f"{remedy}, or tune it on a task with 'metier train'")


def _recipe_key(config: PretrainConfig, about: Mapping[str, Any]) -> str:
    """Names the checkpoints of a recipe."""
    return runs.fingerprint(
        [dict(about) | {"config": config.model_dump(mode="json", exclude=_FREE)}]
    )[:12]


@dataclass(frozen=True)
class _Training:
    """One training of a recipe.

    Attributes:
        config: the recipe.
        start: what is trained.
        tokenizer: its tokenizer.
        files: tokens of each source that is trained on.
        scratch: keeps checkpoints; an interrupted training goes on from there.
        progress: is told every step.
        world: the processes that share it.

    """

    config: PretrainConfig
    start: Start
    tokenizer: Tokenizer
    files: Sequence[Path]
    scratch: Path
    progress: Progress
    world: World

    def run(self, directory: Path, read: Mapping[str, Read], ratio: Ratio | None) -> None:
        """Train, write the base into a directory, and beside it how that went.

        Args:
            directory: receives the base.
            read: what was found in each source.
            ratio: given for a given base, which is compared with what it was.

        """
        held_out, score = self._held_out(read), self._scorer()
        before = self._before(score, held_out) if ratio else {}
        state = self._train(score, held_out)
        self.progress.stage(f"write {self.config.name}")
        written = self.start.write(directory)
        facts = self._facts(state)
        if ratio:
            first = {"step": 0} | bits_per_byte(before, held_out)
            facts["curve"] = [_finite(first), *facts["curve"]]
            changes = compared(before, bits_of(Scorer(written), held_out), held_out, ratio)
            facts["held_out"] = [change.row() for change in changes]
            for change in changes:
                self.progress.say(str(change))
        (directory / "training.json").write_text(json.dumps(facts, indent=1))

    def share(self) -> None:
        """Train with the first process, which alone looks at held-out text."""
        self._train(self._scorer(), [])

    def _scorer(self) -> Scorer:
        compiled = self.config.tokens >= _WORTH_COMPILING and not self.config.adapter
        return Scorer(self.start.model, compiled=compiled)

    def _before(self, score: Scorer, held_out: Sequence[HeldOut]) -> Bits:
        self.progress.stage(f"measure {self.config.base}")
        bits = bits_of(score, held_out)
        self._tell(bits, held_out, "before the first step")
        return bits

    def _held_out(self, read: Mapping[str, Read]) -> list[HeldOut]:
        length = min(_EVALUATION_LENGTH, context_of(self.start.model) or _EVALUATION_LENGTH)
        found = []
        for source in self.config.sources:
            windows = read[source.name].windows
            if windows:
                found.append(
                    HeldOut.of(source.name, windows, self.tokenizer, length, trained=source.trained)
                )
            elif source.held_out > 0:
                self.progress.say(f"'{source.name}' has no held-out text for a figure")
        return found

    def _train(self, score: Scorer, held_out: Sequence[HeldOut]) -> State:
        config, steps = self.config, math.ceil(self.config.tokens / self.config.step_tokens)
        schedule = trapezoid(steps, config.warmup, round(steps * config.decay))
        plan = Plan(
            steps=steps,
            schedule=schedule,
            seed=config.seed,
            evaluate_every=config.evaluate_every,
            checkpoint_seconds=config.checkpoint_seconds,
        )
        mixture = self._mixture()
        if (highest := max(map(schedule, range(steps)))) < 1:
            self.progress.say(
                f"with {config.warmup} of {steps} steps of warm-up the learning rate only reaches "
                f"{highest:.0%} of its peak: give fewer warmup_steps, or more tokens"
            )

        def evaluate() -> Mapping[str, float]:
            bits = bits_of(score, held_out)
            self._tell(bits, held_out, "now")
            return bits_per_byte(bits, held_out)

        self.progress.stage(f"train {config.name}", steps)
        return Loop(
            self.start.model,
            window_loss(score),
            mixture,
            self.start.optimizers,
            plan,
            directory=self.scratch,
            evaluate=evaluate if held_out else None,
            resumed=lambda state: _check_resumed(state, plan, config, self.progress),
            world=self.world,
            progress=self.progress,
        ).run()

    def _mixture(self) -> Mixture:
        config, files = self.config, [stream.TokenFile(path) for path in self.files]
        weights = stream.pass_weights(config.trained, [file.size for file in files])
        pairs = list(zip(files, weights, strict=True))
        mixture = Mixture(pairs, config.lengths, config.micro_tokens, config.seed, self.tokenizer)
        whole = sum(file.size * weight for file, weight in pairs)
        told = ", ".join(
            f"{file.name} {file.size * weight / whole:.1%} ({weight:.3g} passes)"
            for file, weight in pairs
        )
        self.progress.say(
            f"{config.tokens:,} tokens are {config.tokens / whole:.2f} passes over the corpus; "
            f"one is {whole:,.0f} tokens: {told}"
        )
        return mixture

    def _tell(self, bits: Bits, held_out: Sequence[HeldOut], when: str) -> None:
        figures = bits_per_byte(bits, held_out)
        told = ", ".join(f"{part.name} {figures[part.name]:.3f}" for part in held_out)
        self.progress.say(f"held-out bits per byte {when}: {told}")

    def _facts(self, state: State) -> dict[str, Any]:
        return {
            "recipe": self.config.model_dump(mode="json", exclude={"root"}),
            "learning_rate": self.start.learning_rate,
            "parameters": sum(p.numel() for p in self.start.model.parameters()),
            "steps": state.step,
            "best_step": state.best_step,
            "tokens_seen": state.step * self.config.step_tokens,
            "curve": [_finite(point) for point in state.curve],
            "versions": runs.versions(),
        }


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def window_loss(score: Scorer) -> Callable[[Window], Tensor]:
    """Sum of the next-token losses of windows, none of which sees another."""

    def loss(window: Window) -> Tensor:
        ids = window.ids.to(score.device)
        rows, length = ids[:, 1:].shape
        every = torch.ones(rows * length, dtype=torch.bool, device=score.device)
        targets = next_tokens(ids[:, 1:].flatten())
        return score(ids[:, :-1].flatten(), [length] * rows, every, targets)

    return loss


def _check_resumed(state: State, plan: Plan, config: PretrainConfig, progress: Progress) -> None:
    """Refuse steps beyond the plan, and say where the learning rates do not meet.

    Raises:
        ConfigError: the plan would end before its learning rate has fallen.

    """
    if state.step > plan.steps or (state.step == plan.steps and not state.finished):
        raise ConfigError(
            "tokens",
            f"is {config.tokens:,}, but {state.step * config.step_tokens:,} are done, at a "
            "learning rate that was to fall to zero later",
            "give as many as before or more, or another output directory",
        )
    planned = plan.schedule(state.step - 1)
    if state.rate is not None and not math.isclose(state.rate, planned):
        progress.say(
            f"the learning rate was at {state.rate:.0%} of its peak and is now at {planned:.0%}: "
            "with other tokens its final fall begins elsewhere, so the model is not the one "
            "that a run with these tokens from the start would give"
        )
