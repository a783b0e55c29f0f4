"""The one renderer of a chat to ids and trained tokens; training, evaluation and serving call it.

An example is the ids of its prompt followed by the ids of its answer, encoded apart. So what a
model is trained on starts with exactly what it is served, whatever the tokenizer would have
merged across the border. Earlier answers in a chat are encoded apart in the same way.

Of an encoder-decoder, the prompt is one text for the encoder, which EOS ends, and the answer is
another for the decoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

from metier.errors import DataError
from metier.records import Chat, Message, transcript
from metier.runs import fingerprint
from metier.task import TemplateName
from metier.text.chat import ChatLayout, Tools
from metier.text.tokenizer import After, Tokenizer

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


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
    """Renders chats with one tokenizer and one template; what an encoder reads has no template.

    Attributes:
        tokenizer: text to ids.
        template: ``plain``, ``question-answer``, or ``chat`` (the tokenizer's own).
        stop_ids: ids that end an answer.
        encoder: whether the model has an encoder for the prompt.
        next_turn: text with which a base that was not taught to stop goes on after an answer;
            empty where the template has none.

    Raises:
        ModelError: the template is ``chat`` and the tokenizer has none, or a broken one.

    """

    def __init__(
        self, tokenizer: Tokenizer, template: TemplateName, *, encoder: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.encoder = encoder
        self._layout: _Layout
        if tokenizer.frame:
            self._layout = _FramedLayout(tokenizer, *tokenizer.frame)
        elif template == "chat":
            self._layout = ChatLayout(tokenizer)
        else:
            self._layout = _TextLayout(tokenizer, _FORMS[template], encoder=encoder)
        self.next_turn = "" if template == "chat" else _FORMS[template].user[0].strip()
        self.stop_ids: frozenset[int] = tokenizer.stop_ids | {self._layout.stop_id}

    def prompt(self, chat: Chat, tools: Tools = ()) -> list[int]:
        """Ids from which a model continues with the answer.

        Raises:
            DataError: the chat is empty, ends with an answer, or does not fit the template.

        """
        _check_asks(chat)
        return self._layout.talk(_checked(chat), tools).prompt(len(chat))

    def example(self, messages: Chat, tools: Tools = ()) -> Rendered:
        """Ids of a whole example; its last message, the answer, is trained, nothing else.

        Raises:
            DataError: the last message is no answer or has weight 0, or the chat does not fit
                the template.
            ModelError: the chat template does not end the answer with a stop token.

        """
        place = f"messages[{len(messages) - 1}]"
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError(place, "is not an answer", "end with an assistant message")
        if messages[-1].get("weight") == 0:
            raise DataError(
                place, "has weight 0: nothing would be trained", "leave this example out"
            )
        _check_asks(messages[:-1])
        return _row(self._layout.talk(_checked(messages), tools), len(messages) - 1)

    def turns(self, messages: Chat, tools: Tools = ()) -> list[Rendered]:
        """Ids of a chat in which every answer is trained, but those of weight 0.

        Every answer is learned behind exactly the ids that it is served behind. So the chat is one
        row where the template keeps an answer as it was written, and a row for each answer where
        it does not (text templates go on with a line break instead of EOS; others drop reasoning).

        Raises:
            DataError: two answers follow each other, or the chat does not fit the template.
            ModelError: the chat template does not end an answer with a stop token.

        """
        talk = self._layout.talk(_checked(messages), tools)
        rows: list[Rendered] = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant" or message.get("weight") == 0:
                continue
            _check_asks(messages[:index])
            row = _row(talk, index)
            if rows and not self.encoder and row.ids[: len(rows[-1].ids)] == rows[-1].ids:
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
        found: list[Any] = [self.template, self.tokenizer.fingerprint, sorted(self.stop_ids)]
        if self.encoder:
            found.append("encoder")
        # Raise when chat templates are written otherwise.
        return fingerprint([*found, 2] if self.template == "chat" else found)


class _Talk(Protocol):
    """One chat under one template."""

    def prompt(self, end: int) -> list[int]:
        """Ids of the first `end` messages and of what asks for the answer to them."""

    def answer(self, index: int) -> list[int]:
        """Ids of the answer at `index`, with its stop token."""


class _Layout(Protocol):
    """How one kind of template lays out prompt and answer."""

    stop_id: int

    def talk(self, messages: list[Message], tools: Tools) -> _Talk: ...

    def jinja(self) -> tuple[str, ...]: ...


def _row(talk: _Talk, index: int) -> Rendered:
    """The example that ends with the answer at `index`."""
    prompt, answer = talk.prompt(index), talk.answer(index)
    return Rendered((*prompt, *answer), (False,) * len(prompt) + (True,) * len(answer))


def _check_asks(chat: Chat) -> None:
    """Refuse messages that an answer cannot follow."""
    if not chat:
        raise DataError("messages", "are empty", "give at least one user message")
    if chat[-1].get("role") == "assistant":
        raise DataError(
            f"messages[{len(chat) - 1}]", "is already an answer", "end with a user message"
        )


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

    def __init__(self, tokenizer: Tokenizer, form: _Form, *, encoder: bool) -> None:
        self.stop_id = tokenizer.eos_id
        self._tokenizer = tokenizer
        self._form = form
        self._encoder = encoder

    def talk(self, messages: list[Message], tools: Tools) -> _TextTalk:
        if tools:
            raise DataError("tools", "cannot be written by a text template", "set template: chat")
        kind = _TwoTexts if self._encoder else _TextTalk
        return kind(self._tokenizer, self._form, messages)

    def jinja(self) -> tuple[str, ...]:
        if self._encoder:
            return (_jinja(_TWO_TEXTS_JINJA, self._form),)
        if self._tokenizer.bos_id is None:
            return (_jinja(_JINJA.replace("START", "''"), self._form),)
        # Some tokenizers mark the start of a text with a blank, but not behind a control token.
        starts = ("bos_token", "bos_token + ' '")
        return tuple(_jinja(_JINJA.replace("START", start), self._form) for start in starts)


class _TextTalk:
    def __init__(self, tokenizer: Tokenizer, form: _Form, messages: list[Message]) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._messages = messages

    def prompt(self, end: int) -> list[int]:
        ids = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        after: After = "start"
        for stretch in self._stretches(self._messages[:end]):
            ids += self._tokenizer.encode(stretch, after)
            after = "text"
        return ids

    def answer(self, index: int) -> list[int]:
        content = _text_of(self._messages[index], index)
        return [*self._tokenizer.encode(content, "text"), self._tokenizer.eos_id]

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


class _FramedLayout:
    """What an encoder reads: the text of a chat alone, between its special tokens."""

    def __init__(
        self, tokenizer: Tokenizer, before: tuple[int, ...], behind: tuple[int, ...]
    ) -> None:
        self.stop_id = tokenizer.eos_id
        self._tokenizer = tokenizer
        self._before, self._behind = before, behind or (tokenizer.eos_id,)

    def talk(self, messages: list[Message], tools: Tools) -> _FramedTalk:
        if tools:
            raise DataError("tools", "cannot be read by an encoder", "leave them out")
        return _FramedTalk(self._tokenizer, self._before, self._behind, messages)

    def jinja(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, slots=True)
class _FramedTalk:
    tokenizer: Tokenizer
    before: tuple[int, ...]
    behind: tuple[int, ...]
    messages: list[Message]

    def prompt(self, end: int) -> list[int]:
        text = transcript(self.messages[:end])
        return [*self.before, *self.tokenizer.encode(text), *self.behind]

    def answer(self, index: int) -> list[int]:
        content = _text_of(self.messages[index], index)
        return [*self.tokenizer.encode(content), self.tokenizer.eos_id]


class _TwoTexts(_TextTalk):
    """The same for an encoder-decoder: nothing is merged across a border that is not there."""

    def prompt(self, end: int) -> list[int]:
        text = "".join(self._stretches(self._messages[:end]))
        # The form's last line break would part the answer from the prompt.
        return [*self._tokenizer.encode(text.rstrip("\n")), self._tokenizer.eos_id]

    def answer(self, index: int) -> list[int]:
        content = _text_of(self._messages[index], index)
        return [*self._tokenizer.encode(content), self._tokenizer.eos_id]


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

_TWO_TEXTS_JINJA = r"""
{%- set all = namespace(text='') -%}
{%- for message in messages -%}
{%- set content = message['content'] or '' -%}
{%- if message['role'] == 'assistant' and loop.last -%}
{{- (all.text + BEFORE).rstrip('\n') + eos_token + content | trim + eos_token -}}
{%- elif message['role'] == 'assistant' -%}
{%- set all.text = all.text + BEFORE + content | trim + AFTER -%}
{%- elif message['role'] == 'user' -%}
{%- set all.text = all.text + USER + content + USER_END -%}
{%- elif message['role'] in ['system', 'developer'] -%}
{%- if content -%}{%- set all.text = all.text + SYSTEM + content + SYSTEM_END -%}{%- endif -%}
{%- else -%}
{{- raise_exception('messages of tools cannot be written by this template') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- (all.text + BEFORE).rstrip('\n') + eos_token -}}{%- endif -%}
""".strip()
"""The same for an encoder-decoder. It writes nothing where nothing is asked or answered."""


def _jinja(template: str, form: _Form) -> str:
    """A form as a chat template."""
    texts = {
        "USER_END": form.user[1],
        "USER": form.user[0],
        "SYSTEM_END": form.system[1],
        "SYSTEM": form.system[0],
        "BEFORE": form.before_answer,
        "AFTER": form.after_answer,
    }
    for name, text in texts.items():
        template = template.replace(name, json.dumps(text))
    return template


def _text_of(message: Message, index: int) -> str:
    if message["role"] in ("tool", "function") or message.get("tool_calls"):
        raise DataError(
            f"messages[{index}]", "uses tools, which text templates cannot", "set template: chat"
        )
    return message.get("content") or ""
