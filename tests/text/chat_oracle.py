"""A second way from a chat to ids and trained tokens, to compare the renderer with.

The renderer hides typed control tokens, renders the real chat and cuts the text by its prompts.
This oracle never shows a template what was typed: it lets *transformers* render the chat with a
sentinel for each text (once for each shape of chat), cuts that text at sentinels and control
tokens, puts the real texts in, and encodes each stretch with a tokenizer that has no control
tokens at all.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tests.text.chat_families import FAMILIES, Family

Chat = list[dict[str, Any]]
Row = tuple[tuple[int, ...], tuple[bool, ...]]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "The word."}},
                "required": ["word"],
            },
        },
    }
]
_SENTINEL = re.compile(r"«(\d+)»")
_ANSWER = "«999»"
_DATES = ((r"Current date: [\d-]+", "Current date: 2024-07-26"),)
_DATES += ((r"Today Date: \d\d \w+ \d{4}", "Today Date: 26 Jul 2024"),)


class Oracle:
    """Expected rows of chats under one family's template.

    Attributes:
        stops: ids that end an answer.
        bos: id of the token at the start, or None.

    """

    def __init__(self, family: Family, directory: Path) -> None:
        described = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        self._ids = {token["content"]: token["id"] for token in described["added_tokens"]}
        self._plain = Backend.from_str(json.dumps({**described, "added_tokens": []}))
        self._theirs = PreTrainedTokenizerFast.from_pretrained(directory)
        self._family = family
        self._control = re.compile(f"({'|'.join(map(re.escape, self._ids))})")
        stops = {family.stop, family.eos or family.stop, *family.stops}
        self._stop = re.compile("|".join(map(re.escape, stops)))
        self.stops = {self._ids[stop] for stop in stops}
        self.bos = self._ids[family.bos] if family.bos else None
        self._known: dict[str, str] = {}
        self._writes_stop, self._trimmed = self._look()

    def rows(self, chat: Chat, tools: bool) -> list[Row]:
        """One row where each answer's row goes on with the next, else a row for each answer."""
        found: list[Row] = []
        for place, message in enumerate(chat):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            ids, trained = self.row(chat[: place + 1], tools)
            if found and ids[: len(found[-1][0])] == found[-1][0]:
                before = found.pop()[1]
                trained = before + trained[len(before) :]
            found.append((ids, trained))
        return found

    def row(self, chat: Chat, tools: bool) -> Row:
        """The last answer, its stop token included, is trained; nothing else is."""
        shape, texts = self._shape(chat)
        whole = self._text(shape, tools)
        *borders, start = self._borders(shape, whole, tools)
        end = self._stop.search(whole, start) if self._writes_stop else None
        ids = self._encode_parts(whole[:start], borders, texts)
        if self.bos is not None and ids[0] != self.bos:
            ids = [self.bos, *ids]
        answer = self._encode_parts(whole[start : end.end() if end else len(whole)], [], texts)
        if not end:
            answer.append(self._ids[self._family.stop])
        return (*ids, *answer), (False,) * len(ids) + (True,) * len(answer)

    def _borders(self, shape: Chat, whole: str, tools: bool) -> list[int]:
        """Where answers start; an old one only where what it was asked behind still stands."""
        found = []
        for place, message in enumerate(shape):
            if message["role"] == "assistant":
                start = self._start(shape[:place], tools)
                if whole.startswith(self._text(shape[: place + 1], tools)[:start]):
                    found.append(start)
        return found

    def _start(self, shape: Chat, tools: bool) -> int:
        """Where the template lets an answer to these messages start."""
        asked = self._text(shape, tools, ask=True)
        before = self._text([*shape, {"role": "assistant", "content": _ANSWER}], tools)
        before = before[: before.index(_ANSWER)]
        if not before.startswith(asked):
            return len(before)
        return len(asked) if tools else len(asked + before[len(asked) :].rstrip(" \t"))

    def _encode_parts(self, text: str, borders: list[int], texts: list[str]) -> list[int]:
        ids: list[int] = []
        for part in (text[a:b] for a, b in zip([0, *borders], [*borders, None], strict=True)):
            swallow = False
            for piece in self._control.split(part):
                if piece in self._ids:
                    ids.append(self._ids[piece])
                else:
                    typed = _SENTINEL.sub(lambda found: texts[int(found[1])], piece)
                    ids += self._plain.encode(typed.lstrip() if swallow else typed).ids
                swallow = self._family.swallows and piece in self._ids
        return ids

    def _shape(self, chat: Chat) -> tuple[Chat, list[str]]:
        """The chat with sentinels for its texts, and the texts as the template writes them."""
        shape: Chat = []
        texts: list[str] = []

        def sentinel(text: str, role: str) -> str:
            left, right = self._trimmed.get(role, (False, False))
            text = text.lstrip() if left or role == "assistant" else text
            texts.append(text.rstrip() if right or role == "assistant" else text)
            return f"«{len(texts) - 1}»"

        for message in chat:
            role, content = message["role"], message.get("content")
            copy = {key: value for key, value in message.items() if key != "weight"}
            copy["content"] = sentinel(content, role) if content else content
            for call in message.get("tool_calls") or []:
                typed = json.loads(call["function"]["arguments"])["word"]
                function = {"name": "look_up", "arguments": {"word": sentinel(typed, "call")}}
                copy["tool_calls"] = [{**call, "function": function}]
            shape.append(copy)
        return shape, texts

    def _text(self, shape: Chat, tools: bool, ask: bool = False) -> str:
        """What transformers makes of a shape."""
        key = json.dumps([shape, tools, ask])
        if key not in self._known:
            text: str = self._theirs.apply_chat_template(
                shape, tools=TOOLS if tools else None, add_generation_prompt=ask, tokenize=False
            )
            for pattern, date in _DATES:
                text = re.sub(pattern, date, text)
            self._known[key] = text
        return self._known[key]

    def _look(self) -> tuple[bool, dict[str, tuple[bool, bool]]]:
        """Whether the template ends answers itself; at which sides it strips which role."""
        roles = ["system"] * self._family.system + ["user", "assistant"]
        chat = [{"role": role, "content": f" «{i}» "} for i, role in enumerate(roles)]
        text = self._text(chat, False)
        trimmed = {}
        for i, role in enumerate(roles):
            at, sentinel = text.index(f"«{i}»"), f"«{i}»"
            trimmed[role] = text[at - 1] != " ", text[at + len(sentinel) : at + 4] != " "
        return self._family.stop in text.rpartition(f"«{len(roles) - 1}»")[2], trimmed


_WORDS = re.split(
    " ",
    "the cat goes home, at 12:30 über naïve Straße 猫が帰る مرحبا привет e\u0301 👩‍👩‍👧 ﬁ ½ x=1; "
    "foo_bar() don't I'll 3.14159 ??? -- ... <b> </b> {{ x }} {% if %} # * _ \\n [ ] { } ( )",
)
_SPACES = (" ", "  ", "\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000", "\r\n")
_HALVES = ("<|", "|>", "<", ">", "<|im_", "_end|>", "[/", "<tool", "think>", "\U000f0000", "«0»")
_TOKENS = sorted({token for family in FAMILIES.values() for token in family.control})
_IN_JSON = [token for token in _TOKENS if '"' not in token]


def random_text(draw: random.Random) -> str:
    """A text with hazards: space at its ends, line breaks, control tokens, halves of them."""
    pieces: list[str] = []
    for _ in range(draw.choice((1, 1, 2, 3, 5, 8, 150 if draw.random() < 0.05 else 4))):
        kind = draw.random()
        pool: Sequence[str] = _WORDS if kind < 0.7 else _TOKENS if kind < 0.85 else _HALVES
        pieces += [draw.choice(pool), draw.choice(_SPACES) if draw.random() < 0.8 else ""]
    if draw.random() < 0.3:
        pieces.insert(0, draw.choice(_SPACES))
    text = "".join(pieces)
    return text if text.strip() else "word"


def random_chat(draw: random.Random, family: Family) -> tuple[Chat, bool]:
    """A chat that ends with an answer of weight 1, and whether tools are offered in it."""
    tools = family.tools and draw.random() < 0.25
    chat: Chat = []
    if family.system and draw.random() < 0.5:
        empty = draw.random() < 0.2
        chat.append({"role": "system", "content": "" if empty else random_text(draw)})
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4, 6))):
        chat.append({"role": "user", "content": random_text(draw)})
        if tools and draw.random() < 0.5:
            word = " ".join(draw.choices(("cat", "猫", *_IN_JSON), k=2))
            function = {"name": "look_up", "arguments": json.dumps({"word": word})}
            call = {"id": "abcdefgh1", "type": "function", "function": function}
            said = random_text(draw) if family.says_and_calls and draw.random() < 0.3 else None
            chat.append({"role": "assistant", "content": said, "tool_calls": [call]})
            if draw.random() < 0.3:
                break
            found = " ".join(draw.choices(("sat", "家", *_IN_JSON), k=2))
            chat.append({"role": "tool", "tool_call_id": "abcdefgh1", "content": found})
        chat.append({"role": "assistant", "content": random_text(draw)})
    for message in chat[:-1]:
        if message["role"] == "assistant" and draw.random() < 0.3:
            message["weight"] = draw.choice((0, 1))
    return chat, tools
