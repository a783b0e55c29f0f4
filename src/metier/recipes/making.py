"""Make the arms: everything an arm needs goes into one directory, from which it is built again.

`fit_classical`, `choose_phrasing` and `tuning.tune` write a directory; `build` turns it into a
Generator. A run evaluates what `build` gives, and `metier serve` serves what `build` gives, so
what was measured is what is served.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metier.errors import ConfigError, ModelError, TrainingError
from metier.evaluation import arms, wording
from metier.evaluation.classical import Classical
from metier.evaluation.remote import RemoteGenerator
from metier.model.adapters import add_adapter, load_adapter, unfreeze
from metier.model.backbone import context_of
from metier.model.device import choose_device, compute_dtype
from metier.model.generate import Engine
from metier.model.head import HeadGenerator, load_head, with_head
from metier.model.load import Base, base_hash, is_encoder_base, load_base
from metier.model.prelude import virtual_tokens
from metier.model.seq2seq import is_seq2seq
from metier.model.tagger import TagGenerator, Tagger
from metier.model.vocabulary import add_tokens, with_tokens_of
from metier.progress import Progress
from metier.recipes.workbench import Workbench
from metier.records import Chat, Completion, Example, Generator
from metier.task import LABELLED, Arm, Task
from metier.text import tags
from metier.text.template import Renderer
from metier.training import classify, preflight, tagging
from metier.training.preflight import Prepared

CHOOSE_ON = 40
"""Validation rows on which each phrasing is tried."""
_ABOUT = "arm.json"


@dataclass(frozen=True)
class Built:
    """An arm ready to answer.

    Attributes:
        generator: answers chats.
        engine: the language model behind it, if it has one of its own.
        notes: what a reader must know of its answers so far, in words.
        count: lets the notes speak of requests, too, that an interrupted start has answered.

    """

    generator: Generator
    engine: Engine | None
    notes: Callable[[], tuple[str, ...]] = tuple
    count: Callable[[Sequence[Chat]], object] = len


class WithinContext:
    """Answers nothing to a request that does not fit the model's context, and counts it."""

    def __init__(self, inner: Generator, fits: arms.Fits) -> None:
        self._inner, self._fits = inner, fits
        self._asked = self._refused = 0

    def generate(self, chats: Sequence[Chat]) -> list[Completion]:
        """Answer each chat; one that does not fit gets an empty answer."""
        fitting = self.count(chats)
        answers = iter(
            self._inner.generate([c for c, fits in zip(chats, fitting, strict=True) if fits])
        )
        refused = Completion("", finished=False, refused=True)
        return [next(answers) if fits else refused for fits in fitting]

    def count(self, chats: Sequence[Chat]) -> list[bool]:
        """Which of the chats fit; they count as asked."""
        fitting = [self._fits(chat) for chat in chats]
        self._asked += len(chats)
        self._refused += fitting.count(False)
        return fitting

    def notes(self) -> tuple[str, ...]:
        """How many did not fit."""
        if not self._refused:
            return ()
        return (
            f"{self._refused} of {self._asked} requests are longer than the base's context: "
            "they were answered with nothing and count as wrong",
        )


def build(bench: Workbench, arm: Arm, directory: Path) -> Built:
    """Build an arm from the directory that it was made into.

    Raises:
        ModelError: a base, adapter or head cannot be loaded.
        RemoteError: the endpoint has no key.

    """
    if arm.method == "classical":
        return Built(Classical.load(directory), None)
    about: dict[str, Any] = json.loads((directory / _ABOUT).read_text("utf-8"))
    if arm.method == "remote":
        return remote(bench, about["phrasing"])
    if not arm.tuned:
        _check_base(bench, arm, directory, about.get("base", ""))
    engine = load_engine(bench, arm, directory if arm.tuned else None)
    if arm.mode == "tags":
        generator = TagGenerator(with_head(Tagger, engine.model, directory), engine.renderer)
        most = engine.context or math.inf
        within = WithinContext(generator, lambda chat: generator.tokens(chat) <= most)
        return Built(within, None, within.notes, within.count)
    if arm.mode == "head":
        classifier = load_head(engine.model, directory)
        return dataclasses.replace(
            _fitted(HeadGenerator(classifier, engine.renderer), engine), engine=None
        )
    if arm.tuned and not arm.retrieves:
        return _fitted(engine, engine)
    return _composed(bench, arm, engine, about["phrasing"])


def _check_base(bench: Workbench, arm: Arm, directory: Path, expected: str) -> None:
    """A tuned arm's adapter knows its base; a prompted arm is checked here."""
    name = base_name(bench, arm)
    if base_hash(name) != expected:
        raise ModelError(
            str(directory),
            f"was measured with another base than '{name}' is now",
            "run 'metier run' again, or put the base back that it was measured with",
        )


def base_name(bench: Workbench, arm: Arm) -> str:
    """Name of the base of an arm."""
    return arm.base or bench.task.bases()[0]


def check_bases(task: Task) -> None:
    """Refuse arms that an encoder cannot be, before anything is loaded.

    Raises:
        ConfigError: it is asked to write, or to read behind virtual tokens, which takes causality.
        ModelError: a base is missing.

    """
    for arm in task.chosen_arms():
        virtual = arm.tuning is not None and "virtual_tokens" in arm.tuning.reads
        if arm.method in ("classical", "remote") or (arm.headed and not virtual):
            continue
        for base in filter(is_encoder_base, task.bases()):
            raise ConfigError(
                f"arm '{arm.name}'",
                f"cannot be made of '{base}', an encoder: it reads texts "
                + (
                    "in both directions, not behind virtual tokens"
                    if virtual
                    else "and writes none"
                ),
                "choose other arms for it, such as arms: [classical, lora/head, full/head] with "
                "kind: classification, or full/tags for spans; or a causal language model as base",
            )


def reading_passes(bench: Workbench, arm: Arm) -> int:
    """Passes over the inputs before an arm learns labels; an encoder does not predict text."""
    if arm.mode != "head" or is_encoder_base(base_name(bench, arm)):
        return 0
    return classify.READING_PASSES


def load_engine(bench: Workbench, arm: Arm, tuned: Path | None) -> Engine:
    """The generation engine of an arm: its base, tuned from a directory or as it is."""
    if not (tuned and arm.tuning):
        return make_engine(bench, load_base(base_name(bench, arm)))
    if not arm.tuning.adapter:
        base = load_base(str(tuned))
        return make_engine(bench, base, base.model)
    base = load_base(base_name(bench, arm), four_bit=arm.tuning.four_bit)
    base = with_tokens_of(base, tuned)
    return make_engine(bench, base, load_adapter(base, tuned))


def load_trainable(bench: Workbench, arm: Arm, seed: int, device: str = "auto") -> tuple[Base, Any]:
    """The base of a tuned arm with the tokens that it learns, and the model to be trained.

    Trained weights are kept in float32; a frozen base in what the fastest device computes in,
    also where it is to lie on another at first.
    """
    import torch

    tuning, training = arm.tuning, bench.task.training
    assert tuning is not None  # noqa: S101  the arm is a tuned one
    dtype = compute_dtype(choose_device()) if tuning.adapter else torch.float32
    base = load_base(base_name(bench, arm), dtype, device, four_bit=tuning.four_bit)
    known = base.tokenizer.vocab_size
    if training.added_tokens:
        base = add_tokens(base, training.added_tokens)
    if not tuning.adapter:
        unfreeze(base.model, training.layers)
        return base, base.model
    new_ids = range(known, base.tokenizer.vocab_size)
    return base, add_adapter(base.model, tuning.name, training, seed, new_ids)


def make_engine(bench: Workbench, base: Base, tuned: Any = None) -> Engine:
    """An engine with the task's template and answer length.

    Args:
        bench: what the arms are made from.
        base: with its tokenizer.
        tuned: the model that the base became; by default the base as it is, which was not
            taught to stop: its answer ends where it begins the next turn.

    """
    encoder = is_seq2seq(base.model)
    renderer = Renderer(base.tokenizer, bench.task.template, encoder=encoder)
    model = base.model if tuned is None else tuned
    limit = preflight.longest(bench.task.training, context_of(model))
    length = bench.task.max_new_tokens or _answer_length(bench, renderer, limit)
    if tuned is not None:
        return Engine(tuned, renderer, length)
    stop = [*_label_ends(bench), renderer.next_turn]
    return Engine(base.model, renderer, length, [text for text in stop if text])


def _answer_length(bench: Workbench, renderer: Renderer, limit: int) -> int:
    """The longest label or answer that is trained on, and a quarter more.

    An answer of a row that is too long to be trained on would take the room of the prompts.
    """
    encode, train = renderer.tokenizer.encode, bench.parts.train
    rows = sorted((len(encode(row.answer)), at) for at, row in enumerate(train))
    while rows and len(renderer.example(train[rows[-1][1]].messages).ids) > limit:
        rows.pop()
    lengths = [len(encode(label)) for label in bench.labels] + [n for n, _ in rows[-1:]]
    return math.ceil(max(lengths, default=1) * 1.25) + 1


def common_context(bench: Workbench, engine: Engine) -> int | None:
    """What the models of all arms over one base can read, so that all read the same text."""
    if engine.context is None:
        return None
    return engine.context + virtual_tokens(engine.model) - bench.task.reserved_tokens()


def longest_row(bench: Workbench, engine: arms.Reader) -> int:
    """Tokens of the longest row that a tuned arm is trained on."""
    limit = preflight.longest(bench.task.training, engine.context)
    if any(arm.tuned and arm.retrieves for arm in bench.task.chosen_arms()):
        return limit  # it is filled with what is looked up
    lengths = [len(engine.renderer.example(row.messages).ids) for row in bench.parts.train]
    if any(arm.mode == "tags" for arm in bench.task.chosen_arms()):
        lengths += [len(tags.read(engine.renderer, row.prompt).ids) for row in bench.parts.train]
    return max((length for length in lengths if length <= limit), default=limit)


def check_room(bench: Workbench, engine: arms.Reader) -> None:
    """Refuse an answer length that leaves no room for what is asked.

    Raises:
        ConfigError: most validation inputs and an answer do not fit the base's context.

    """
    fits = arms.room_in(engine)
    rows = bench.parts.validation
    alone = [len(engine.renderer.prompt(row.prompt)) for row in rows]
    long = sum(engine.context is not None and tokens >= engine.context for tokens in alone)
    if 2 * long > len(rows):
        raise ConfigError(
            "base",
            f"its context of {engine.context:,} tokens is too short for {long:,} of {len(rows):,} "
            f"validation inputs, the longest of {max(alone):,} tokens, even without an answer",
            "choose a base with a longer context, or shorten the inputs",
        )
    cut = sum(not fits(row.prompt) for row in rows)
    if 2 * cut > len(rows):
        raise ConfigError(
            "max_new_tokens",
            f"an answer of up to {engine.max_new_tokens:,} tokens leaves no room for {cut:,} of "
            f"{len(rows):,} validation inputs in the base's context of {engine.context:,} tokens",
            "lower max_new_tokens, shorten the inputs, or choose a base with a longer context",
        )


def choose_phrasing(bench: Workbench, arm: Arm, directory: Path, progress: Progress) -> None:
    """Try the phrasings of a prompted arm on validation and write the best into `directory`."""
    if arm.method == "remote":
        inner: Callable[[str], Built] = lambda name: remote(bench, name)  # noqa: E731
    else:
        engine = load_engine(bench, arm, None)
        inner = lambda name: _composed(bench, arm, engine, name)  # noqa: E731
    names = [phrasing.name for phrasing in wording.phrasings(bench.task.kind)]
    progress.stage(f"choose the wording of {arm.name}")
    candidates = {name: inner(name).generator for name in names}
    choice = arms.choose(candidates, bench.parts.validation, bench.grader, CHOOSE_ON)
    base = "" if arm.method == "remote" else base_hash(base_name(bench, arm))
    write_about(directory, arm, choice.name, choice.scores, base)


def write_about(
    directory: Path,
    arm: Arm,
    phrasing: str,
    scores: dict[str, float] | None = None,
    base: str = "",
) -> None:
    """Write how the arm words its requests, and the hash of the base that it asks."""
    about = {"arm": arm.name, "phrasing": phrasing, "scores": scores or {}, "base": base}
    (directory / _ABOUT).write_text(json.dumps(about), "utf-8")


def fit_classical(bench: Workbench, directory: Path) -> None:
    """Fit the classical arm and write it."""
    parts = bench.parts
    Classical.fit(parts.train, parts.validation, bench.task.kind).save(directory)


def composer(bench: Workbench, arm: Arm, fits: arms.Fits, phrasing: str) -> Any:
    """How an arm words its requests and what it looks up for them."""
    task = bench.task
    # A tuned arm has learned what to do; only what is looked up is put beside the input.
    if arm.tuned:
        worded = wording.Wording(wording.BARE)
    else:
        known = {one.name: one for one in wording.phrasings(task.kind)}
        answers = [row.answer for row in bench.parts.train]
        instruction = wording.default_instruction(task, answers)
        worded = wording.Wording(known[phrasing], instruction, bench.labels)
    if arm.method == "few-shot":
        return arms.few_shot(worded, fits, bench.shots)
    if arm.retrieves:
        return arms.rag(worded, fits, bench.snippets)
    return arms.prompt(worded, fits)


def prepare(bench: Workbench, arm: Arm, engine: arms.Reader) -> tuple[Prepared, Prepared]:
    """Training and validation rows of a tuned arm.

    Raises:
        TrainingError: a row could not be learned from, or its answer never be written.

    """
    if arm.mode == "tags":
        return _tagged(bench, engine)
    compose = composer(bench, arm, room(bench, arm, engine), "")
    training = bench.task.training
    if arm.mode == "head":  # the label is that of the whole conversation
        training = training.model_copy(update={"turns": "last"})

    def prepared(part: Sequence[Example], name: str) -> Prepared:
        composed = [
            dataclasses.replace(row, messages=(*compose(row.prompt), row.messages[-1]))
            for row in part
        ]
        return preflight.prepare(composed, engine.renderer, training, engine.context, name)

    parts = bench.parts
    rows = prepared(parts.train, "training"), prepared(parts.validation, "validation")
    if arm.mode == "text":
        check_answers(bench, engine)
    return rows


def _tagged(bench: Workbench, engine: arms.Reader) -> tuple[Prepared, Prepared]:
    parts, types = bench.parts, tagging.types_of(bench.parts.train)
    more = engine.renderer, bench.task.training, engine.context, types
    return (
        tagging.prepare(parts.train, *more, "training"),
        tagging.prepare(parts.validation, *more, "validation"),
    )


def check_answers(bench: Workbench, engine: arms.Reader) -> None:
    """Refuse a limit under which a tuned arm could not write what it was taught.

    Raises:
        TrainingError: `max_new_tokens` is below the longest training answer with its stop token.

    """
    rows = [(row, e) for e in bench.parts.train for row in preflight.render(e, engine.renderer)]
    limit = preflight.longest(bench.task.training, engine.context)
    kept = [(sum(row.trained), example) for row, example in rows if len(row.ids) <= limit]
    longest, example = max(kept, key=lambda pair: pair[0])
    if longest > engine.max_new_tokens:
        raise TrainingError(
            example.place,
            f"its answer is {longest:,} tokens long with its stop token, but max_new_tokens is "
            f"{engine.max_new_tokens:,}: a tuned arm's answers would be cut",
            f"set max_new_tokens: {longest}, or leave it out, or shorten the answer",
        )


def room(bench: Workbench, arm: Arm, engine: arms.Reader) -> arms.Fits:
    """What a composed chat must fit into: the context, and where it is trained, `max_length`.

    Room is kept for the longest known answer, not for the answer of the row at hand: so an
    example is composed in training as its input is when it is asked.
    """
    fits = arms.room_in(engine)
    if not (arm.tuned and arm.retrieves):
        return fits
    limit = preflight.longest(bench.task.training, engine.context)
    held_out = [r for e in bench.parts.validation for r in preflight.render(e, engine.renderer)]
    answers = [sum(row.trained) for row in held_out if len(row.ids) <= limit]
    longest = max([engine.max_new_tokens, *answers])
    return lambda chat: len(engine.renderer.prompt(chat)) + longest <= limit


def _composed(bench: Workbench, arm: Arm, engine: Engine, phrasing: str) -> Built:
    fits = arms.room_in(engine)
    compose = composer(bench, arm, room(bench, arm, engine), phrasing)
    if arm.mode == "likelihood":
        inner = WithinContext(arms.Likelihood(engine, lambda chat: chat, bench.labels), fits)
    else:
        inner = WithinContext(engine, fits)
    return Built(
        arms.Composed(inner, compose),
        engine,
        lambda: (*compose.notes(), *inner.notes()),
        lambda chats: inner.count([compose(chat) for chat in chats]),
    )


def _label_ends(bench: Workbench) -> tuple[str, ...]:
    """Labels are one line; a model that was not taught to stop goes on with more of its own."""
    return ("\n",) if bench.task.kind in LABELLED else ()


def _fitted(generator: Generator, engine: Engine) -> Built:
    within = WithinContext(generator, arms.room_in(engine))
    return Built(within, engine, within.notes, within.count)


def remote(bench: Workbench, phrasing: str) -> Built:
    """The remote arm.

    Raises:
        RemoteError: the address is none, or its key is not in the environment.

    """
    settings = bench.task.remote
    assert settings is not None  # noqa: S101  the task was validated so
    limit = bench.task.max_new_tokens or max(len(row.answer) for row in bench.parts.train) + 16
    endpoint = RemoteGenerator(settings, limit, _label_ends(bench))
    compose = composer(bench, Arm(method="prompt"), lambda _: True, phrasing)
    return Built(arms.Composed(endpoint, compose), None, endpoint.notes)
