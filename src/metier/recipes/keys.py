"""What the result of every stage depends on; its hash is part of the stage's name.

Too little here would let an old result stand for a changed task; too much would make again what
has not changed. Who reads a field named here: `making`, `tuning` and `workbench.save`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metier.model.load import base_hash, is_encoder_decoder, load_tokenizer, locate
from metier.recipes.workbench import Workbench
from metier.records import Example
from metier.runs import fingerprint
from metier.task import TUNINGS, Arm
from metier.text.template import Renderer

Inputs = dict[str, Any]

# Raise when stored results of older code must not be reused.
_EDITION = 8
_REHEARSAL = 2


class Keys:
    """The inputs of the stages of one run.

    A base is hashed when the first stage asks for it, so that arms without a base need none.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._bases: dict[str, dict[str, str]] = {}

    def data(self) -> Inputs:
        """Of what `workbench.save` writes."""
        bench = self._bench
        return {
            "task": bench.task.model_dump(mode="json"),
            "base_dir": str(bench.base_dir.resolve()),
            "train": _rows(bench.parts.train),
            "validation": _rows(bench.parts.validation),
            "labels": bench.labels,
            "passages": fingerprint(bench.passages),
        }

    def making(self, arm: Arm, seed: int = 0) -> Inputs:
        """Of making an arm; the seed counts for a tuned one."""
        found: Inputs = {
            "edition": _EDITION,
            "arm": arm.name,
            "data": self._bench.train_identity,
        }
        if self._bench.task.kind == "multi-label":  # which are learned otherwise
            found["kind"] = self._bench.task.kind
        if arm.method == "classical":
            return found
        if arm.method != "remote":
            hashes = self._base(arm)
            found["base"] = [hashes["weights"], hashes["renderer"]]
        found |= self._training(arm, seed) if arm.tuned else self._asking(arm)
        return found | self._looking_up(arm)

    def answers(self, arm: Arm, directory: Path, examples: Sequence[Example]) -> Inputs:
        """Of the graded answers of an arm that was made into a directory."""
        return self.cost(arm, directory) | {
            "grader": self._bench.grader.identity,
            "rows": _rows(examples),
        }

    def cost(self, arm: Arm, directory: Path) -> Inputs:
        """Of how long an arm takes to answer.

        The directory's name stands for what made the arm; the rest is read when it is built.
        """
        if arm.method == "classical":
            return {"arm": directory.name}
        return {"arm": directory.name, "kind": self._bench.task.kind, **self._length(arm)}

    def ability(self, arm: Arm, directory: Path | None) -> Inputs:
        """Of what a tuned arm knows, or its base, which is measured without a template."""
        material = self._bench.material
        hashes = self._base(arm)
        found: Inputs = {
            "edition": _EDITION,
            "model": directory.name if directory else [hashes["weights"], hashes["tokenizer"]],
            "material": fingerprint([dataclasses.asdict(material)]),
        }
        reserved = self._bench.task.reserved_tokens()
        return found | {"reserved": reserved} if reserved else found

    def rehearsal(self, arm: Arm) -> Inputs:
        """Of what a base writes of its own, without a template."""
        hashes = self._base(arm)
        return {"edition": _REHEARSAL, "base": [hashes["weights"], hashes["tokenizer"]]}

    def opening(self, answers: Sequence[Inputs]) -> Inputs:
        """Of a look at the sealed part: what is answered there."""
        return {"test": self._bench.parts.test_fingerprint, "answers": list(answers)}

    def _training(self, arm: Arm, seed: int) -> Inputs:
        """A tuned arm learns from the bare chat: no instruction, no labels unless it has a head.

        Who computes a training does not change it.
        """
        unread = {"seeds", "shard"} | {field for one in TUNINGS.values() for field in one.reads}
        unread -= arm.tuning.reads if arm.tuning else frozenset()
        if arm.headed:
            unread.add("rehearsal")
        if arm.mode != "head":
            unread.add("class_weights")
        training = self._bench.task.training.model_dump(mode="json", exclude=unread)
        for field in ("layers", "added_tokens", "class_weights"):
            if not training.get(field):  # as if the field had never been there
                training.pop(field, None)
        found: Inputs = {"training": training, "seed": seed}
        return found | {"labels": self._bench.labels} if arm.mode == "head" else found

    def _asking(self, arm: Arm) -> Inputs:
        """A prompted arm chooses its wording by the grades of answers to the validation part.

        Of an endpoint only what answers counts: what it costs and which key opens it do not.
        """
        task = self._bench.task
        remote = task.remote.model_dump(include={"base_url", "model"}) if task.remote else None
        return {
            "wording": task.model_dump(mode="json", include={"kind", "instruction", "good", "bad"}),
            "grader": self._bench.grader.identity,
            "graded": _rows(self._bench.parts.validation),
            "remote": remote if arm.method == "remote" else None,
            **self._length(arm),
        }

    def _looking_up(self, arm: Arm) -> Inputs:
        """How much that was looked up is shown depends on the room that an answer needs."""
        if arm.method != "few-shot" and not arm.retrieves:
            return {}
        found: Inputs = {"retrieval": self._bench.task.retrieval.model_dump(mode="json")}
        if arm.method != "few-shot":
            found["passages"] = fingerprint(self._bench.passages)
        return found | self._length(arm)

    def _length(self, arm: Arm) -> Inputs:
        """What the longest answer is found from, besides the training answers.

        Where it is found by a tokenizer, answers too long to be trained on do not count.
        """
        task = self._bench.task
        found: Inputs = {"max_new_tokens": task.max_new_tokens, "labels": self._bench.labels}
        if task.max_new_tokens is None and arm.method != "remote":
            found["max_length"] = task.training.max_length
        return found

    def _base(self, arm: Arm) -> dict[str, str]:
        """What decides a base's answers: its weights, and how text and chats become ids."""
        name = arm.base or self._bench.task.bases()[0]
        if name not in self._bases:
            tokenizer, encoder = load_tokenizer(locate(name)), is_encoder_decoder(name)
            renderer = Renderer(tokenizer, self._bench.task.template, encoder=encoder)
            self._bases[name] = {
                "weights": base_hash(name),
                "tokenizer": tokenizer.fingerprint,
                "renderer": renderer.fingerprint,
            }
        return self._bases[name]


def _rows(examples: Sequence[Example]) -> str:
    """Hash of examples in all that a grader may read, wherever their file lies."""
    return fingerprint(
        [
            dataclasses.asdict(example) | {"source": Path(example.source).name}
            for example in examples
        ]
    )
