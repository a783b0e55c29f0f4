"""The one renderer of a chat to ids and trained tokens; training, evaluation and serving call it.

An example is the ids of its prompt followed by the ids of its answer, encoded apart. So what a
model is trained on starts with exactly what it is served, whatever the tokenizer would have
merged across the border. Earlier answers in a chat are encoded apart in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

from metier.errors import DataError, MetierError, ModelError
from metier.records import Chat, Message
from metier.runs import fingerprint
from metier.task import TemplateName
from metier.text.tokenizer import After, Tokenizer

Tools = Sequence[Mapping[str, Any]]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_PROBE = "an answer to probe with"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A whole example as ids.

    Attributes:
        ids: prompt, answer and stop token.
        trained: which of them the loss looks at: the answer and the stop token.

    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


class Renderer:
    """Renders chats with one tokenizer and one template.

    Attributes:
        tokenizer: text to ids.
        template: ``plain``, ``question-answer``, or ``chat`` (the tokenizer's own).
        stop_ids: ids that end an answer.
        next_turn: text with which a base that was not taught to stop goes on after an answer;
            empty where the template has none.

    Raises:
        ModelError: the template is ``chat`` and the tokenizer has none, or a broken one.

    """

    def __init__(self, tokenizer: Tokenizer, template: TemplateName) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._layout: _Layout
        if template == "chat":
            self._layout = _ChatLayout(tokenizer)
        else:
            self._layout = _TextLayout(tokenizer, _FORMS[template])
        self.next_turn = "" if template == "chat" else _FORMS[template].user[0].strip()
        self.stop_ids: frozenset[int] = tokenizer.stop_ids | {self._layout.stop_id}

    def prompt(self, chat: Chat, tools: Tools = ()) -> list[int]:
        """Ids from which a model continues with the answer.

        Raises:
            DataError: the chat is empty, ends with an answer, or does not fit the template.

        """
        if not chat:
            raise DataError("messages", "are empty", "give at least one user message")
        if chat[-1].get("role") == "assistant":
            raise DataError(
                f"messages[{len(chat) - 1}]", "is already an answer", "end with a user message"
            )
        return self._layout.prompt(_checked(chat), tools)

    def example(self, messages: Chat, tools: Tools = ()) -> Rendered:
        """Ids of a whole example; its last message, the answer, is trained, nothing else.

        Raises:
            DataError: the last message is no answer or has weight 0, or the chat does not fit
                the template.
            ModelError: the chat template rewrites the prompt when the answer is added.

        """
        place = f"messages[{len(messages) - 1}]"
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError(place, "is not an answer", "end with an assistant message")
        if messages[-1].get("weight") == 0:
            raise DataError(
                place, "has weight 0: nothing would be trained", "leave this example out"
            )
        prompt = self.prompt(messages[:-1], tools)
        answer = self._layout.answer(_checked(messages), tools)
        trained = (False,) * len(prompt) + (True,) * len(answer)
        return Rendered((*prompt, *answer), trained)

    def turns(self, messages: Chat, tools: Tools = ()) -> list[Rendered]:
        """Ids of a chat in which every answer is trained, but those of weight 0.

        Every answer is learned behind exactly the ids that it is served behind. So the chat is one
        row where the template keeps an answer as it was written, and a row for each answer where
        it does not (text templates go on with a line break instead of EOS; others drop reasoning).

        Raises:
            DataError: two answers follow each other, or the chat does not fit the template.
            ModelError: the chat template rewrites the prompt when the answer is added.

        """
        rows: list[Rendered] = []
        for end, message in enumerate(messages, start=1):
            if message.get("role") != "assistant" or message.get("weight") == 0:
                continue
            row = self.example(messages[:end], tools)
            if rows and row.ids[: len(rows[-1].ids)] == rows[-1].ids:
                trained = rows.pop().trained
                row = Rendered(row.ids, (*trained, *row.trained[len(trained) :]))
            rows.append(row)
        return rows

    def answer(self, ids: Sequence[int]) -> str:
        """Text of generated ids: up to the first stop token, stripped."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end]).strip()

    def show(self, rendered: Rendered) -> str:
        """Text of an example for people, the trained tokens between ⟦ and ⟧."""
        parts = []
        pairs = zip(rendered.trained, rendered.ids, strict=True)
        for trained, group in groupby(pairs, key=lambda pair: pair[0]):
            text = self.tokenizer.decode([token for _, token in group])
            parts.append(f"⟦{text}⟧" if trained else text)
        return "".join(parts)

    def jinja(self) -> tuple[str, ...]:
        """Chat templates with which plain Transformers may write the same ids, the likeliest first.

        No template can say that text is encoded in stretches, or that control tokens typed by
        users are text: whether one gives the same ids must be seen on real chats.
        """
        return self._layout.jinja()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids."""
        return fingerprint([self.template, self.tokenizer.fingerprint, sorted(self.stop_ids)])


class _Layout(Protocol):
    """How one kind of template lays out prompt and answer."""

    stop_id: int

    def prompt(self, chat: list[Message], tools: Tools) -> list[int]: ...

    def answer(self, messages: list[Message], tools: Tools) -> list[int]: ...

    def jinja(self) -> tuple[str, ...]: ...


def _checked(chat: Chat) -> list[Message]:
    """Messages with known roles and text contents; answers are stripped."""
    checked = []
    for index, message in enumerate(chat):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise DataError(
                f"messages[{index}].role", f"is {role!r}", f"use one of {', '.join(_ROLES)}"
            )
        if content is not None and not isinstance(content, str):
            raise DataError(
                f"messages[{index}].content", "is not text", "metier reads text content only"
            )
        if role == "assistant" and content is not None:
            message = Message(**{**message, "content": content.strip()})
        checked.append(message)
    return checked


@dataclass(frozen=True, slots=True)
class _Form:
    """What a text template writes around messages."""

    system: tuple[str, str]
    user: tuple[str, str]
    before_answer: str
    after_answer: str


_FORMS = {
    "plain": _Form(("", "\n"), ("", "\n"), "", "\n"),
    "question-answer": _Form(("", "\n\n"), ("### Question:\n", "\n\n"), "### Answer:\n", "\n\n"),
}


class _TextLayout:
    """``plain`` and ``question-answer``: text only, then EOS."""

    def __init__(self, tokenizer: Tokenizer, form: _Form) -> None:
        self.stop_id = tokenizer.eos_id
        self._tokenizer = tokenizer
        self._form = form

    def prompt(self, chat: list[Message], tools: Tools) -> list[int]:
        _refuse(tools)
        ids = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        after: After = "start"
        for stretch in self._stretches(chat):
            ids += self._tokenizer.encode(stretch, after)
            after = "text"
        return ids

    def answer(self, messages: list[Message], tools: Tools) -> list[int]:
        _refuse(tools)
        content = _text_of(messages[-1], len(messages) - 1)
        return [*self._tokenizer.encode(content, "text"), self.stop_id]

    def jinja(self) -> tuple[str, ...]:
        if self._tokenizer.bos_id is None:
            return (_jinja("''", self._form),)
        # Some tokenizers mark the start of a text with a blank, but not behind a control token.
        return (_jinja("bos_token", self._form), _jinja("bos_token + ' '", self._form))

    def _stretches(self, chat: list[Message]) -> Iterator[str]:
        """The text before each answer, each answer, and the text that asks for the next."""
        text = ""
        for index, message in enumerate(chat):
            content = _text_of(message, index)
            if message["role"] == "assistant":
                yield text + self._form.before_answer
                yield content
                text = self._form.after_answer
            elif message["role"] == "user":
                text += content.join(self._form.user)
            elif content:
                text += content.join(self._form.system)
        yield text + self._form.before_answer


_JINJA = """
{{- START -}}
{%- for message in messages -%}
{%- set content = message['content'] or '' -%}
{%- if message['role'] == 'assistant' -%}
{{- BEFORE + content | trim + (eos_token if loop.last else AFTER) -}}
{%- elif message['role'] == 'user' -%}
{{- USER + content + USER_END -}}
{%- elif message['role'] in ['system', 'developer'] -%}
{%- if content -%}{{- SYSTEM + content + SYSTEM_END -}}{%- endif -%}
{%- else -%}
{{- raise_exception('messages of tools cannot be written by this template') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- BEFORE -}}{%- endif -%}
""".strip()


def _jinja(start: str, form: _Form) -> str:
    """A form as a chat template; `start` is an expression."""
    texts = {
        "USER_END": form.user[1],
        "USER": form.user[0],
        "SYSTEM_END": form.system[1],
        "SYSTEM": form.system[0],
        "BEFORE": form.before_answer,
        "AFTER": form.after_answer,
    }
    template = _JINJA.replace("START", start)
    for name, text in texts.items():
        template = template.replace(name, json.dumps(text))
    return template


def _refuse(tools: Tools) -> None:
    if tools:
        raise DataError("tools", "cannot be written by a text template", "set template: chat")


def _text_of(message: Message, index: int) -> str:
    if message["role"] in ("tool", "function") or message.get("tool_calls"):
        raise DataError(
            f"messages[{index}]", "uses tools, which text templates cannot", "set template: chat"
        )
    return message.get("content") or ""


class _ChatLayout:
    """``chat``: the tokenizer's own Jinja template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stop = self._probe_stop()
        # A template that writes no stop token leaves it to us.
        self.stop_id = tokenizer.control_tokens[self._stop] if self._stop else tokenizer.eos_id

    def prompt(self, chat: list[Message], tools: Tools) -> list[int]:
        disguise = _Disguise(self._tokenizer, chat, tools)
        text = self._render(disguise, len(chat), True)
        cuts = [0]
        for index, message in enumerate(chat):
            if message["role"] == "assistant":
                before = self._render(disguise, index, True)
                # A template that rewrites history (drops old reasoning) has no such border.
                if text.startswith(before):
                    cuts.append(len(before))
        parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
        return self._with_bos(self._encode(parts, disguise, "start"))

    def answer(self, messages: list[Message], tools: Tools) -> list[int]:
        disguise = _Disguise(self._tokenizer, messages, tools)
        before = self._render(disguise, len(messages) - 1, True)
        whole = self._render(disguise, len(messages), False)
        if not whole.startswith(before):
            raise ModelError(
                f"chat template of {self._tokenizer.name}",
                "is not prefix-preserving: it rewrites the prompt once the answer is there",
                "set template: question-answer, or mend the chat template",
            )
        text = whole[len(before) :]
        last = self._tokenizer.split_control(before)[-1]
        ids = self._encode([self._until_stop(text)], disguise, "text" if last else "control")
        return ids if self._stop else [*ids, self.stop_id]

    def jinja(self) -> tuple[str, ...]:
        template = self._tokenizer.bare_template()
        bos = self._tokenizer.bos_id
        text = self._tokenizer.render([{"role": "user", "content": "a question"}], (), True)
        if bos is None or text.startswith(self._tokenizer.decode([bos])):
            return (template,)
        return ("{{- bos_token -}}" + template,)

    def _until_stop(self, text: str) -> str:
        """The answer with its stop token; what the template writes after that is dropped."""
        if not self._stop:
            return text
        if self._stop not in text:
            raise ModelError(
                f"chat template of {self._tokenizer.name}",
                f"does not end this answer with its stop token {self._stop}",
                "set template: question-answer, or mend the chat template",
            )
        return text[: text.index(self._stop) + len(self._stop)]

    def _probe_stop(self) -> str:
        """The control token that the template writes after an answer, or an empty string."""
        chat: list[Message] = [
            {"role": "user", "content": "a question"},
            {"role": "assistant", "content": _PROBE},
        ]
        try:
            text = self._render(_Disguise(self._tokenizer, chat, ()), 2, False)
        except DataError as error:
            raise ModelError(
                error.place,
                f"cannot write a plain question and answer: {error.cause}",
                "set template: question-answer, or mend the chat template",
            ) from None
        found = self._tokenizer.control_pattern.search(text.rpartition(_PROBE)[2])
        return found.group() if found else ""

    def _render(self, disguise: _Disguise, messages: int, add_generation_prompt: bool) -> str:
        """Disguised text of the first messages."""
        try:
            return self._tokenizer.render(
                disguise.messages[:messages], disguise.tools, add_generation_prompt
            )
        except MetierError:
            raise
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"chat template of {self._tokenizer.name}",
                f"refuses this chat ({error})",
                "bring the messages into the order that the template wants",
            ) from None

    def _encode(self, parts: list[str], disguise: _Disguise, after: After) -> list[int]:
        """Ids of disguised text: only the control tokens written by the template count."""
        ids: list[int] = []
        for part in parts:
            for index, piece in enumerate(self._tokenizer.split_control(part)):
                if index % 2:
                    ids.append(self._tokenizer.control_tokens[piece])
                    after = "control"
                elif piece:
                    ids += self._tokenizer.encode(disguise.take_off(piece), after)
                    after = "text"
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


class _Disguise:
    """Hides control-token strings typed by users while a template runs.

    Each one becomes a private-use character that occurs nowhere else, so that every control
    token found in the rendered text was written by the template.
    """

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools) -> None:
        self._pattern = tokenizer.control_pattern
        typed = list(_strings([*messages, *tools]))
        found = sorted({match for text in typed for match in self._pattern.findall(text)})
        taken = set("".join(typed)) | set(tokenizer.chat_template or "")
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
        self._masks = dict(zip(found, free, strict=False))
        self.messages: list[dict[str, Any]] = self._put_on(list(messages))
        self.tools: list[dict[str, Any]] = self._put_on(list(tools))

    def _put_on(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._masks[match.group()], value)
        if isinstance(value, Mapping):
            return {self._put_on(key): self._put_on(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._put_on(item) for item in value]
        return value

    def take_off(self, text: str) -> str:
        """Text as the user typed it."""
        for original, mask in self._masks.items():
            # A template may have written the character as JSON.
            text = text.replace(mask, original).replace(json.dumps(mask)[1:-1], original)
        return text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
