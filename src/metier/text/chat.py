"""``template: chat``: a chat in the words of the tokenizer's own Jinja template.

A model is asked with all that the template writes in front of an answer's text: also what it does
not write into a generation prompt, such as an empty block of reasoning. So an answer is its text
and the stop token, and the model is asked for the answer itself, not for reasoning before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from metier.errors import DataError, MetierError, ModelError
from metier.records import Message
from metier.text.tokenizer import After, Tokenizer

Tools = Sequence[Mapping[str, Any]]

_OTHER = "set template: question-answer, or mend the chat template"
_CALL_FORMS = ((None, False), ("", False), (None, True), ("", True))
"""Contents of a message that only calls tools, and whether arguments are JSON in a string."""


class ChatLayout:
    """How one chat template writes chats.

    Attributes:
        stop_id: id of the token that the template writes behind an answer, else EOS.
        writes_stop: the template ends its answers itself.
        ends: control tokens that end an answer where the template writes them.
        lead: what it writes in front of an answer and not when it is asked for one.
        space: what stands in front of an answer's text and is encoded with it.

    Raises:
        ModelError: the template cannot write a question and an answer.

    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.name = f"chat template of {tokenizer.name}"
        self._left_out: dict[object, str] = {}
        stop, self.lead, self.space = self._probe()
        # A template that writes no stop token leaves it to us.
        self.stop_id = tokenizer.control_tokens[stop] if stop else tokenizer.eos_id
        self.writes_stop = bool(stop)
        # An ordinary token may be a stop too, and stand inside an answer: it does not end one.
        stops = tokenizer.stop_ids | {self.stop_id}
        self.ends = stops.intersection(tokenizer.control_tokens.values())

    def talk(self, messages: list[Message], tools: Tools) -> ChatTalk:
        """One chat, ready to be turned into ids."""
        return ChatTalk(self, self._tokenizer, self._in_form(messages), tools)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Tools, ask: bool = False) -> str:
        """Text of messages.

        Raises:
            DataError: the template does not want them.

        """
        try:
            return self._tokenizer.render(messages, tools, ask)
        except MetierError:
            raise
        except Exception as error:  # a template may raise anything
            raise DataError(
                self.name,
                f"refuses this chat ({error})",
                "give it the roles in the order that the template wants; where it takes no "
                "system message, let the instruction open the first user message",
            ) from None

    def refuse_left_out(self, messages: Sequence[Message], tools: Tools) -> None:
        """Refuse a chat of which the template would not write a message, a call or a tool.

        Raises:
            DataError: the first that is left out.

        """
        shape = (
            *((m["role"], bool(m.get("content")), len(_calls(m))) for m in messages),
            len(tools),
        )
        if shape not in self._left_out:
            self._left_out[shape] = self._find_left_out(messages, tools)
        if self._left_out[shape]:
            raise DataError(
                self._left_out[shape],
                f"is left out by the {self.name}",
                "drop it from the data, say it in a role that the template writes, or choose a "
                "base whose template writes it",
            )

    def jinja(self) -> tuple[str, ...]:
        """The template that gives the prompts that are served, for a tokenizer of its own."""
        template = self._tokenizer.bare_template()
        if self.lead:
            lead = json.dumps(self.lead)
            template += f"{{%- if add_generation_prompt -%}}{{{{- {lead} -}}}}{{%- endif -%}}"
        bos = self._tokenizer.bos_id
        text = self.render([{"role": "user", "content": "a question"}], (), ask=True)
        if bos is None or text.startswith(self._tokenizer.decode([bos])):
            return (template,)
        return ("{{- bos_token -}}" + template,)

    def _probe(self) -> tuple[str, str, str]:
        """The stop token, and what stands in front of an answer: words are encoded with spaces."""
        question: list[Message] = [{"role": "user", "content": "a question"}]
        talk = ChatTalk(self, self._tokenizer, question, ())
        try:
            asked = self.render(question, (), ask=True)
            written, behind = talk.around_answer(1)
        except DataError as error:
            raise ModelError(
                error.place, f"cannot write a plain question and answer: {error.cause}", _OTHER
            ) from None
        lead = written[len(asked) :] if written.startswith(asked) else ""
        found = self._tokenizer.control_pattern.search(behind)
        bare = lead.rstrip(" \t")
        return found.group() if found else "", bare, lead[len(bare) :]

    def _find_left_out(self, messages: Sequence[Message], tools: Tools) -> str:
        """Place of what is not written, found by the same chat with other words in it."""
        marked, marked_tools, expected = _marked(messages, tools)
        try:
            text = self.render(marked, marked_tools, messages[-1]["role"] != "assistant")
        except DataError:
            return ""  # the chat itself is refused with its own words
        return next((place for mark, place in expected.items() if mark not in text), "")

    def _in_form(self, messages: list[Message]) -> list[Message]:
        """The messages with tool calls in the form that the template reads."""
        formed = []
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                message = self._calling(message, f"messages[{index}]")
            elif message.get("content") is None:
                message = Message(**{**message, "content": ""})
            formed.append(message)
        return formed

    def _calling(self, message: Message, place: str) -> Message:
        if self._call_form is None:
            raise DataError(
                f"{place}.tool_calls",
                f"cannot be written by the {self.name}",
                "leave the row out, or choose a base whose template writes tool calls",
            )
        empty, as_text = self._call_form
        calls = [
            _with_arguments(call, as_text, f"{place}.tool_calls[{number}]")
            for number, call in enumerate(message["tool_calls"])
        ]
        changes = {"content": message.get("content") or empty, "tool_calls": calls}
        return cast("Message", {**message, **changes})

    @cached_property
    def _call_form(self) -> tuple[str | None, bool] | None:
        """The first form in which the template writes a call whole; None: it writes none."""
        for empty, as_text in _CALL_FORMS:
            arguments = {"key0mark": "value0mark"}
            function = {"name": "call0mark", "arguments": json.dumps(arguments)}
            call = {"id": "call00000", "type": "function", "function": function}
            chat: list[Any] = [
                {"role": "user", "content": "a question"},
                {
                    "role": "assistant",
                    "content": empty,
                    "tool_calls": [_with_arguments(call, as_text, "")],
                },
            ]
            try:
                text = self.render(chat, ())
            except DataError:
                continue
            whole = all(mark in text for mark in ("call0mark", "key0mark", "value0mark"))
            # Python's words for a mapping or nothing, or JSON written as JSON once more.
            if whole and not any(bad in text for bad in ("{'key0mark'", "None", '\\"key0mark')):
                return empty, as_text
        return None


class ChatTalk:
    """One chat, rendered by a layout and turned into ids."""

    def __init__(
        self, layout: ChatLayout, tokenizer: Tokenizer, messages: list[Message], tools: Tools
    ) -> None:
        self._layout = layout
        self._tokenizer = tokenizer
        self._messages = messages
        self._tools = tools
        self._disguise = _Disguise(tokenizer, messages, tools)
        self._openings: dict[int, str] = {}

    def prompt(self, end: int) -> list[int]:
        """Ids of the first messages and of what asks for the answer to them.

        Raises:
            DataError: the template refuses a message or leaves it out.

        """
        self._layout.refuse_left_out(self._messages[:end], self._tools)
        text = self._opening(end)
        cuts = [0]
        for index, message in enumerate(self._messages[:end]):
            # A template that rewrites history (drops old reasoning) has no such border.
            if message["role"] == "assistant" and text.startswith(self._opening(index)):
                cuts.append(len(self._opening(index)))
        parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]
        return self._with_bos(self._encode(parts, "start"))

    def answer(self, index: int) -> list[int]:
        """Ids of the answer at a place, up to its stop token.

        Raises:
            DataError: the template leaves a part of the answer out, or writes another beginning
                of this answer than it is asked for with.
            ModelError: the template does not end the answer with a stop token.

        """
        self._layout.refuse_left_out(self._messages[: index + 1], self._tools)
        before = self._opening(index)
        whole = self._layout.render(self._disguise.messages[: index + 1], self._disguise.tools)
        if not whole.startswith(before):
            raise DataError(
                f"messages[{index}]",
                f"the {self._layout.name} begins this answer in another way than it asks for one",
                "leave reasoning out of the answer, name the tools that it calls in `tools`, or "
                "set template: question-answer",
            )
        text = whole[len(before) :]
        content = self._disguise.messages[index].get("content") or ""
        if "".join(content.split()) not in "".join(text.split()):
            raise DataError(
                f"messages[{index}].content",
                f"is not written whole by the {self._layout.name}",
                "leave out of the answer what the template drops (reasoning, text beside a call)",
            )
        last = self._tokenizer.split_control(before)[-1]
        return self._until_stop(self._encode([text], "text" if last else "control"))

    def around_answer(self, end: int) -> tuple[str, str]:
        """What the template writes before and behind an answer to the first messages.

        Raises:
            DataError: it does not write the text of an answer.

        """
        answer = {"role": "assistant", "content": self._disguise.answer}
        asked = [*self._disguise.messages[:end], answer]
        before, mark, behind = self._layout.render(asked, self._disguise.tools).rpartition(
            self._disguise.answer
        )
        if not mark:
            raise DataError(
                self._layout.name, "does not write the text of an answer", "choose another base"
            )
        return before, behind

    def _opening(self, end: int) -> str:
        """All that stands in front of an answer to the first messages."""
        if end not in self._openings:
            self._openings[end] = self._find_opening(end)
        return self._openings[end]

    def _find_opening(self, end: int) -> str:
        before = self.around_answer(end)[0].removesuffix(self._layout.space)
        if self._tools:
            # Text or a call may follow: nothing of either is put into the prompt.
            messages, tools = self._disguise.messages[:end], self._disguise.tools
            asked = self._layout.render(messages, tools, ask=True)
            return asked if before.startswith(asked) else before
        return before

    def _until_stop(self, ids: list[int]) -> list[int]:
        """The ids up to the first stop token; what the template writes after that is dropped."""
        if not self._layout.writes_stop:
            return [*ids, self._layout.stop_id]
        ends = self._layout.ends
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        if end is None:
            raise ModelError(
                self._layout.name,
                "does not end this answer with a stop token: neither "
                f"{self._tokenizer.decode([self._layout.stop_id])} nor one that "
                "generation_config.json names",
                _OTHER,
            )
        return ids[: end + 1]

    def _encode(self, parts: list[str], after: After) -> list[int]:
        """Ids of disguised text: only the control tokens written by the template count."""
        ids: list[int] = []
        for part in parts:
            for index, piece in enumerate(self._tokenizer.split_control(part)):
                if index % 2:
                    ids.append(self._tokenizer.control_tokens[piece])
                    after = "control"
                elif piece:
                    ids += self._tokenizer.encode(self._disguise.take_off(piece), after)
                    after = "text"
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _with_arguments(call: Any, as_text: bool, place: str) -> dict[str, Any]:
    """An OpenAI tool call with its arguments as JSON in a string, or as a mapping."""
    try:
        arguments = call["function"]["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(call["function"]["name"], str) or not isinstance(parsed, Mapping):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise DataError(
            place,
            "is not a tool call with a JSON object as arguments",
            'write {"type": "function", "function": {"name": "...", "arguments": "{...}"}}',
        ) from None
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    written = arguments if as_text else parsed
    return {**call, "function": {**call["function"], "arguments": written}}


def _marked(
    messages: Sequence[Message], tools: Tools
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """A chat with a mark for each text, call and tool, and the place that each mark stands for."""
    expected: dict[str, str] = {}

    def mark(place: str) -> str:
        text = f"mark{len(expected)}here"
        expected[text] = place
        return text

    def named(item: Mapping[str, Any], place: str) -> dict[str, Any]:
        return {**item, "function": {**item["function"], "name": mark(place)}}

    marked: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        changed: dict[str, Any] = dict(message)
        # Text beside an old call is reasoning to some templates, and reasoning is not kept.
        if _calls(message):
            changed["tool_calls"] = [
                named(call, f"messages[{index}].tool_calls[{number}]")
                for number, call in enumerate(_calls(message))
            ]
        elif message.get("content"):
            changed["content"] = mark(f"messages[{index}] (role {message['role']})")
        marked.append(changed)
    marked_tools = [
        named(tool, f"tools[{number}]") if "function" in tool else dict(tool)
        for number, tool in enumerate(tools)
    ]
    return marked, marked_tools, expected


class _Disguise:
    """Hides control-token strings typed by users while a template runs.

    Each one becomes a private-use character that occurs nowhere else, so that every control
    token found in the rendered text was written by the template.

    Attributes:
        messages: the chat, disguised.
        tools: the tools, disguised.
        answer: a character that stands for an answer's text, and occurs nowhere else.

    """

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools) -> None:
        self._pattern = tokenizer.control_pattern
        typed = list(_strings([*messages, *tools]))
        found = sorted({match for text in typed for match in self._pattern.findall(text)})
        taken = set("".join(typed)) | set(tokenizer.chat_template or "")
        free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
        self.answer = next(free)
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
