"""What an export is held to: the arm's own answers to the user's prompts, and its logits.

The arm answers as it was built for the verdict. Every form of it (merged, reloaded by plain
Transformers, served over HTTP) must then read the same ids, write the same tokens, and give the
same logits within what rounding explains; anything else refuses the export.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from metier.errors import ExportError
from metier.evaluation.proof import Asked, Form, Tie
from metier.model import parity, reloaded
from metier.model.generate import Engine
from metier.progress import Progress
from metier.recipes.answering import Specialist
from metier.records import Chat
from metier.serving import gateway
from metier.task import Task
from metier.text.template import Renderer

_REMEDY = (
    "nothing was exported; serve the run itself with 'metier serve', which answers as measured, "
    "and please report this"
)
_SHOWN = 200
_AT_ONCE = 16
_FIELDS = ("role", "content", "name")


@dataclass(frozen=True)
class Prompt:
    """One request, without the expected output."""

    id: str
    chat: Chat

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As other programs are given it."""
        return [{key: m[key] for key in _FIELDS if key in m} for m in map(dict, self.chat)]


@dataclass(frozen=True)
class Answer:
    """What one form of the model made of a prompt.

    Attributes:
        text: the answer.
        tokens: how many were written, the stop token included.
        read: how many tokens the prompt had.
        ids: the tokens written, where they are known.

    """

    text: str
    tokens: int
    read: int
    ids: tuple[int, ...] | None = None


class Trial:
    """The arm's answers to some prompts, to which every form of it is held.

    Attributes:
        prompts: what is asked.
        ids: of the prompts, as metier serves them.
        renderer: chat to ids, and ids to text.
        max_new_tokens: longest answer in tokens.
        reference: the arm's logits over its own answers, and their noise.

    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], progress: Progress) -> None:
        self.prompts = tuple(prompts)
        self.renderer = engine.renderer
        self.max_new_tokens = engine.max_new_tokens
        self.ids = [self.renderer.prompt(prompt.chat) for prompt in prompts]
        progress.stage("answer as the arm", len(self.ids))
        self._answers = written(engine, self.ids, progress)
        ids = [answer.ids or () for answer in self._answers]
        kept = parity.kept(ids, engine.model.config.get_text_config().vocab_size)
        rows = [
            parity.Forced(tuple(prompt), answer, count)
            for prompt, answer, count in zip(self.ids, ids, kept, strict=True)
        ]
        progress.stage("measure the noise of rounding", 2 * len(rows))
        self.reference = parity.Reference(engine.model, rows, progress.advance)

    def asked(self) -> tuple[Asked, ...]:
        """What was asked, without its text."""
        rows = zip(self.prompts, self.reference.rows, strict=True)
        return tuple(
            Asked(
                id=prompt.id,
                prompt_tokens=len(row.prompt),
                answer_tokens=len(row.answer),
                compared_tokens=row.kept,
            )
            for prompt, row in rows
        )

    def check_prompts(self, found: Iterable[Sequence[int]]) -> None:
        """Refuse a chat template that gives other ids than metier serves."""
        check_ids(self.renderer, self.prompts, self.ids, found)

    def hold(
        self,
        name: Literal["merged", "reloaded", "served"],
        answers: Sequence[Answer],
        logits: Iterable[torch.Tensor] = (),
    ) -> Form:
        """Compare a form of the model with the arm.

        Args:
            name: of the form.
            answers: to the prompts, in their order.
            logits: over the arm's own answers, in the same order; none where they are not known.

        Raises:
            ExportError: a prompt, a text or a logit differs by more than rounding explains.

        """
        ties = [tie for row in range(len(answers)) if (tie := self._tie(name, row, answers[row]))]
        differences = [self.reference.difference(row, own) for row, own in enumerate(logits)]
        for row, difference in enumerate(differences):
            if not difference <= self.reference.bound:
                raise self._refusal(
                    name,
                    row,
                    f"a logit differs by {difference:.3g}, and rounding explains "
                    f"{self.reference.bound:.3g} (the answer is {_shown(answers[row].text)}, "
                    f"the arm's {_shown(self._answers[row].text)})",
                )
        return Form(
            name=name,
            same=len(answers) - len(ties),
            ties=tuple(ties),
            largest_difference=max(differences) if differences else None,
        )

    def _tie(self, name: str, row: int, other: Answer) -> Tie | None:
        """None where the answer is the arm's; the tie from which on it is another."""
        own = self._answers[row]
        if other.read != own.read:
            raise self._refusal(name, row, f"is read as {other.read} tokens, not as {own.read}")
        at = self._parting(row, other)
        if at is None and other.text == own.text:
            return None
        if at is not None and self.reference.is_tie(row, at):
            return Tie(prompt=self.prompts[row].id, token=at, gap=self.reference.gap(row, at))
        mine, others = _around(own.text, other.text)
        where = f" from token {at} on" if at is not None else ", though its tokens are the same"
        count = f" ({other.tokens} tokens, the arm {own.tokens})" if mine == others else ""
        raise self._refusal(
            name, row, f"is answered with {others}, by the arm with {mine}{where}{count}"
        )

    def _parting(self, row: int, other: Answer) -> int | None:
        """Place of the first token that differs; by the text where only that is known."""
        own = self._answers[row].ids or ()
        if other.ids is not None:
            pairs = enumerate(zip(own, other.ids, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(own), len(other.ids)))
            return None if own == other.ids else first
        if (other.text, other.tokens) == (self._answers[row].text, len(own)):
            return None
        decode = self.renderer.tokenizer.decode
        # The last character may be one of several bytes, of which not all are there.
        starts = (decode(own[: end + 1]).lstrip().rstrip("\ufffd") for end in range(len(own)))
        parting = (at for at, text in enumerate(starts) if not other.text.startswith(text))
        return next(parting, len(own) - 1)

    def _refusal(self, name: str, row: int, cause: str) -> ExportError:
        return ExportError(f"{name} model, prompt '{self.prompts[row].id}'", cause, _REMEDY)


def check_ids(
    renderer: Renderer,
    prompts: Sequence[Prompt],
    served: Iterable[Sequence[int]],
    found: Iterable[Sequence[int]],
) -> None:
    """Refuse prompts that plain Transformers reads as other ids than metier serves.

    Raises:
        ExportError: names the first prompt and where its ids part.

    """
    for prompt, own, other in zip(prompts, served, found, strict=True):
        if list(own) == list(other):
            continue
        pairs = enumerate(zip(own, other, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(own), len(other)))
        decode = renderer.tokenizer.decode
        ours, theirs = (_shown(decode(ids[at : at + 8])) for ids in (own, other))
        raise ExportError(
            f"chat template, prompt '{prompt.id}'",
            f"from token {at} on plain Transformers reads {theirs}, where metier serves {ours}: "
            "no chat template can say that earlier answers are encoded apart, or that control "
            "tokens typed in a message are text",
            "leave such prompts out (--prompts FILE) where they will not be asked, or serve the "
            "run itself with 'metier serve'",
        )


def written(engine: Engine, prompts: Sequence[Sequence[int]], progress: Progress) -> list[Answer]:
    """Greedy answers of an engine."""
    found: list[Answer] = []
    for start in range(0, len(prompts), _AT_ONCE):
        chunk = prompts[start : start + _AT_ONCE]
        found += [
            Answer(engine.renderer.answer(ids), len(ids), len(prompt), tuple(ids))
            for prompt, ids in zip(chunk, engine.generate_ids(chunk), strict=True)
        ]
        progress.advance(len(chunk))
    return found


def ask(trial: Trial, engine: Engine, progress: Progress) -> Form:
    """Hold a merged model in memory to the arm.

    Raises:
        ExportError: it differs.

    """
    progress.stage("ask the merged model", len(trial.ids))
    answers = written(engine, trial.ids, progress)
    logits = (parity.logits(engine.model, row) for row in trial.reference.rows)
    return trial.hold("merged", answers, logits)


def reload(
    trial: Trial, directory: Path, model: Mapping[str, str | None], progress: Progress
) -> Form:
    """Hold what plain Transformers makes of a directory, in a process of its own, to the arm.

    Args:
        trial: what it is held to.
        directory: what was exported; nothing is left in it.
        model: the arm's ``dtype``, ``device`` and ``attention``, and of an adapter its ``base``.
        progress: is told every prompt.

    Raises:
        ExportError: it cannot be loaded, or differs.

    """
    from safetensors import safe_open

    work = directory / "work"
    work.mkdir(exist_ok=True)
    rows = zip(trial.prompts, trial.reference.rows, strict=True)
    asked = {
        "directory": str(directory),
        **model,
        "threads": torch.get_num_threads(),
        "rows": [{"messages": p.messages, "ids": row.ids, "kept": row.kept} for p, row in rows],
    }
    (work / "questions.json").write_text(json.dumps(asked), "utf-8")
    progress.stage("reload in a fresh process", len(trial.prompts))
    _in_fresh_process(work, progress)
    answers = json.loads((work / "answers.json").read_text("utf-8"))
    trial.check_prompts(answer["prompt"] for answer in answers)
    found = [
        Answer(one["text"], len(one["ids"]), len(one["prompt"]), tuple(one["ids"]))
        for one in answers
    ]
    with safe_open(str(work / "logits.safetensors"), framework="pt") as file:
        logits = (file.get_tensor(str(row)) for row in range(len(found)))
        form = trial.hold("reloaded", found, logits)
    shutil.rmtree(work)
    return form


def _in_fresh_process(work: Path, progress: Progress) -> None:
    files = [str(work / name) for name in ("questions.json", "answers.json", "logits.safetensors")]
    command = [sys.executable, "-P", reloaded.__file__, *files]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with (
        (work / "errors").open("wb") as errors,
        subprocess.Popen(  # noqa: S603  our own script, no shell
            command, stdout=subprocess.PIPE, stderr=errors, env=os.environ | offline
        ) as process,
    ):
        try:
            for _ in process.stdout or ():
                progress.advance()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        said = (work / "errors").read_text("utf-8", "replace").strip().splitlines()
        raise ExportError(
            "reloaded model",
            f"plain Transformers cannot use the directory ({said[-1] if said else 'no reason'})",
            _REMEDY,
        )


def serve(trial: Trial, engine: Engine, task: Task, progress: Progress) -> Form:
    """Hold what an engine answers over HTTP on loopback to the arm.

    Raises:
        ExportError: it does not end answers where the arm does, or differs.

    """
    stops, own = (r.stop_ids for r in (engine.renderer, trial.renderer))
    if stops != own:
        odd = _shown(trial.renderer.tokenizer.decode(sorted(stops ^ own)))
        raise ExportError("stop tokens", f"{odd} ends answers in one of both only", _REMEDY)
    progress.stage("serve and ask over HTTP", len(trial.prompts))
    specialist = Specialist(f"{task.name}:export", task, engine, engine, ())
    answers = []
    for answer in _over_http(specialist, trial.prompts):
        answers.append(answer)
        progress.advance()
    return trial.hold("served", answers)


def _over_http(specialist: Specialist, prompts: Sequence[Prompt]) -> Iterator[Answer]:
    key = secrets.token_urlsafe(32)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with gateway.listening({specialist.name: specialist}, key) as port:
        for prompt in prompts:
            body = json.dumps({"model": specialist.name, "messages": prompt.messages})
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            reply = json.loads(response.read())
            connection.close()
            if response.status != http.HTTPStatus.OK:
                cause = f"is refused ({reply['error']['message']})"
                raise ExportError(f"served model, prompt '{prompt.id}'", cause, _REMEDY)
            usage = reply["usage"]
            text = reply["choices"][0]["message"]["content"]
            yield Answer(text, usage["completion_tokens"], usage["prompt_tokens"])


def _around(one: str, other: str) -> tuple[str, str]:
    """Two texts, cut to where they part."""
    pairs = enumerate(zip(one, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, at - _SHOWN // 2)
    return _shown(one[start:]), _shown(other[start:])


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
