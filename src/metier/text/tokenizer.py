"""The tokenizer: text to ids and back, where text can never become a control token.

A *control token* steers the model (start of a turn, end of text). Only templates may write one;
the same characters typed by a user, or standing in a document, are encoded as plain text.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from metier.errors import ConfigError, DataError, ModelError
from metier.text.sandbox import compile_template

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

After = Literal["start", "control", "text"]
"""What stands before a stretch of text: nothing, a control token, or other text."""

# Stands for "a control token was here" when a stretch of text is encoded. Drawn anew by each
# process, so that no text can hold it; its id never leaves this module.
_SENTINEL = f"\ufdd0{secrets.token_hex(16)}\ufdd0"


class Tokenizer:
    """A thin wrapper over a Hugging Face fast tokenizer.

    Attributes:
        bos_id: id of the beginning-of-sequence token, or None.
        eos_id: id of the end-of-sequence token.
        pad_id: id used to fill batches: the padding token, else `eos_id` (never looked at).
        stop_ids: ids that end an answer: `eos_id` and those of generation_config.json.
        vocab_size: number of ids; every id is below it.
        chat_template: the Jinja chat template (several of them joined), or None.
        control_tokens: every control token with its id.
        frame: of an encoder, ids that stand before and behind every text (BERT's [CLS] and
            [SEP]); its eos_id is the last of them. None for others.

    """

    def __init__(
        self,
        backend: PreTrainedTokenizerFast,
        name: str,
        extra_stop_ids: Sequence[int] = (),
        *,
        encoder: bool = False,
    ) -> None:
        self.frame = _frame(backend) if encoder else None
        eos_id = self.frame[1][-1] if self.frame and self.frame[1] else backend.eos_token_id
        if eos_id is None:
            raise ModelError(
                name,
                "its tokenizer names no end-of-sequence token",
                "set eos_token in tokenizer_config.json",
            )
        self.name = name
        self.bos_id: int | None = backend.bos_token_id
        self.eos_id: int = eos_id
        self.pad_id: int = self.eos_id if backend.pad_token_id is None else backend.pad_token_id
        self.chat_template: str | None = _template_text(backend.chat_template)
        self.stop_ids = frozenset({self.eos_id, *extra_stop_ids})
        self._backend = backend
        self._special_tokens: dict[str, Any] = dict(backend.special_tokens_map)
        described = json.loads(backend.backend_tokenizer.to_str())
        self._added = {token["content"]: token for token in described["added_tokens"]}
        self.control_tokens = _control_tokens(backend, self._added, self.chat_template or "")
        # The unknown token is what unknown characters honestly become.
        self._control_ids = frozenset(self.control_tokens.values()) - {backend.unk_token_id}
        self._plain, self._sentinel = _without_control(described, self.control_tokens, name)
        self._newline = self._raw("\n")
        self._marks_start = self._raw("\na") != self._newline + self._raw("a")
        self.vocab_size: int = max(backend.get_vocab().values()) + 1

    @classmethod
    def load(
        cls, name: str | Path, extra_stop_ids: Collection[int] = (), *, encoder: bool = False
    ) -> Tokenizer:
        """Load from a directory or a Hub name; remote code is never run.

        Args:
            name: directory or name.
            extra_stop_ids: ids that end an answer besides those that its files name.
            encoder: whether it belongs to an encoder.

        Raises:
            ModelError: there is no tokenizer, or it cannot be read.

        """
        backend = _load_backend(str(name))
        named = _generation_stop_ids(Path(name), backend)
        return cls(backend, str(name), [*named, *extra_stop_ids], encoder=encoder)

    def extended(self, tokens: Sequence[str]) -> Tokenizer:
        """The same with new tokens behind all others: each stands for its text wherever that is.

        Raises:
            ConfigError: one is a token already, or changes text: tokenizers that mark the start of
                a text mark that behind a new token, too, and others lose characters beyond ASCII.

        """
        from tokenizers import AddedToken

        for token in tokens:
            if self._backend.convert_tokens_to_ids(token) not in (None, self._backend.unk_token_id):
                raise ConfigError(
                    "training.added_tokens",
                    f"'{token}' is a token of '{self.name}' already",
                    "leave it out, or write it otherwise",
                )
        backend = copy.deepcopy(self._backend)
        # Not normalised: they are found in a text as it is written, and come out so.
        backend.add_tokens([AddedToken(token, normalized=False) for token in tokens])
        encoder = self.frame is not None
        found = Tokenizer(backend, self.name, sorted(self.stop_ids), encoder=encoder)
        for text in (f"a {token}b" for token in tokens):
            if (back := found.decode(found.encode(text))) != text:
                raise ConfigError(
                    "training.added_tokens",
                    f"'{self.name}' would read '{text}' as '{back}'",
                    "use ASCII characters, or a base with another tokenizer",
                )
        return found

    @property
    def opening_id(self) -> int:
        """Id that a text begins after: `bos_id`, else `eos_id`, which ends the text before it."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str, after: After = "start") -> list[int]:
        """Ids of plain text: no BOS or EOS is added and no control token is ever yielded.

        Args:
            text: what to encode; control-token strings in it are ordinary characters.
            after: what the text follows. SentencePiece-like tokenizers mark the start of a text,
                and must not do so where text goes on.

        Raises:
            DataError: the text is not valid Unicode, or a character cannot be encoded without a
                control token.

        """
        return self._checked(self._encode_after(text, after), text, after)

    def encode_batch(self, texts: Sequence[str], begins: Sequence[bool]) -> list[list[int]]:
        """`encode` of many texts, on all cores.

        Args:
            texts: what to encode.
            begins: of each, whether it stands at the start; else it goes on a text.

        """
        leads = ["" if start or not self._marks_start else "\n" for start in begins]
        joined = [lead + text for lead, text in zip(leads, texts, strict=True)]
        batch = self._plain.encode_batch_fast(joined, add_special_tokens=False)
        found = []
        for lead, text, encoding in zip(leads, texts, batch, strict=True):
            ids = self._after_newline(encoding.ids, text) if lead else list(encoding.ids)
            found.append(self._checked(ids, text, "text" if lead else "start"))
        return found

    def _checked(self, ids: list[int], text: str, after: After) -> list[int]:
        """Ids of a text without those of control tokens."""
        if self._control_ids.isdisjoint(ids):
            return ids
        middle = self._inside_control(text)
        return self.encode(text[:middle], after) + self.encode(text[middle:], "text")

    def _inside_control(self, text: str) -> int:
        """Where to cut a text that is encoded as a control token.

        The vocabulary itself holds its string (Unigram, WordLevel): the cut goes through it.
        """
        if len(text) < 2:
            raise DataError(
                f"tokenizer {self.name}",
                f"the character {text!r} is encoded as a control token",
                "remove the character, or choose another base",
            )
        found = self.control_pattern.search(text)
        return found.start() + 1 if found else len(text) // 2

    def locate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode` of a text that goes on another, and the characters that each id stands for.

        Returns:
            the ids, and of each its first character and its end. They are as the tokenizer has
            them: white space before a word may belong to it, and all ids of a character that
            takes several stand for the whole of it.

        """
        lead = "\n" if self._marks_start else ""
        found = self._encoding(lead + text)
        if lead and found.ids[: len(self._newline)] != self._newline:
            lead, found = "", self._encoding(text)
        first = len(self._newline) if lead else 0
        ids = list(found.ids[first:])
        if self._control_ids.isdisjoint(ids):
            return ids, [(a - len(lead), b - len(lead)) for a, b in found.offsets[first:]]
        middle = self._inside_control(text)
        ids, offsets = self.locate(text[:middle])
        behind, others = self.locate(text[middle:])
        return ids + behind, offsets + [(a + middle, b + middle) for a, b in others]

    def _encode_after(self, text: str, after: After) -> list[int]:
        if after == "control":
            ids = self._raw(_SENTINEL + text)
            return ids[ids.index(self._sentinel) + 1 :]
        if after == "text" and self._marks_start:
            return self._after_newline(self._raw("\n" + text), text)
        return self._raw(text)

    def _after_newline(self, ids: list[int], text: str) -> list[int]:
        """Ids of a text from those of a newline and it."""
        if ids[: len(self._newline)] == self._newline:
            return ids[len(self._newline) :]
        return self._raw(text)

    def _raw(self, text: str) -> list[int]:
        return list(self._encoding(text).ids)

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            return self._plain.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise DataError(
                "text", "is not valid Unicode (a lone surrogate)", "save the data as UTF-8 anew"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control tokens appear as their strings."""
        text: str = self._backend.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
    ) -> str:
        """Text that the chat template writes, in our sandbox.

        Raises:
            ModelError: there is no chat template.
            Exception: whatever the template raises.

        """
        if self.chat_template is None:
            raise ModelError(
                self.name,
                "its tokenizer has no chat template",
                "set template: question-answer, or choose a base with a chat template",
            )
        # Some tokenizers have one template for chats with tools and one for others.
        offered = [dict(tool) for tool in tools] or None
        write = compile_template(self._backend.get_chat_template(tools=offered))
        return write(
            messages=messages,
            tools=offered,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
        )

    def split_control(self, text: str) -> list[str]:
        """Cut text at control-token strings: text, control, text, control, ..., text.

        White space that a control token swallows (its `lstrip` and `rstrip`) is removed.
        """
        pieces = self.control_pattern.split(text)
        for index in range(1, len(pieces), 2):
            token = self._added[pieces[index]]
            if token["lstrip"]:
                pieces[index - 1] = pieces[index - 1].rstrip()
            if token["rstrip"]:
                pieces[index + 1] = pieces[index + 1].lstrip()
        return pieces

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Matches any control-token string, the longest first; one group."""
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides ids."""
        parts = [
            self._backend.backend_tokenizer.to_str(),
            json.dumps([self.bos_id, self.eos_id, self.pad_id, sorted(self.stop_ids)]),
            self.chat_template or "",
            *([json.dumps(self.frame)] if self.frame else []),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def save(self, directory: Path, chat_template: str | None = None) -> None:
        """Write tokenizer files that `load` and transformers read.

        Args:
            directory: is there already.
            chat_template: stands in place of its own one; decoding then changes no blanks either,
                as `decode` changes none.

        """
        backend = copy.copy(self._backend)
        if chat_template is not None:
            backend.chat_template = chat_template
            backend.clean_up_tokenization_spaces = False
        backend.save_pretrained(str(directory))

    def bare_template(self) -> str:
        """The chat template for requests without tools; the tokenizer must have one."""
        return str(self._backend.get_chat_template())


def _load_backend(name: str) -> PreTrainedTokenizerFast:
    import transformers

    # tokenizer.json alone is complete; AutoTokenizer (slow to import) converts older formats.
    whole = (Path(name) / "tokenizer.json").is_file()
    kind = "PreTrainedTokenizerFast" if whole else "AutoTokenizer"
    try:
        backend = getattr(transformers, kind).from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the Hub client share no base class
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            name,
            f"its tokenizer cannot be loaded ({cause})",
            "the directory needs tokenizer.json and tokenizer_config.json",
        ) from None
    if not getattr(backend, "is_fast", False):
        raise ModelError(name, "has no fast tokenizer", "convert it to tokenizer.json first")
    found: PreTrainedTokenizerFast = backend
    return found


def _frame(backend: PreTrainedTokenizerFast) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer writes before and behind a text of its own accord."""
    bare = backend("a", add_special_tokens=False)["input_ids"]
    whole = backend("a")["input_ids"]
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])


def _generation_stop_ids(directory: Path, backend: PreTrainedTokenizerFast) -> list[int]:
    """End-of-sequence ids that only generation_config.json names (e.g. the end of a turn)."""
    try:
        config = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        ids = config["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if isinstance(i, int) and 0 <= i < len(backend)]


def _template_text(template: str | Mapping[str, str] | None) -> str | None:
    """One text, also where the tokenizer has several named templates (with and without tools)."""
    text = "\n".join(template.values()) if isinstance(template, Mapping) else template
    return text or None


def _control_tokens(
    backend: PreTrainedTokenizerFast, added: Mapping[str, Mapping[str, Any]], template: str
) -> dict[str, int]:
    """Special tokens, and added tokens that the chat template names."""
    special = set(backend.all_special_tokens)
    return {
        content: token["id"]
        for content, token in added.items()
        if content.strip() and (token["special"] or content in special or content in template)
    }


def _without_control(
    described: dict[str, Any], control: Mapping[str, int], name: str
) -> tuple[tokenizers.Tokenizer, int]:
    """A copy that does not know the control tokens, with the sentinel and its id instead.

    Args:
        described: the whole tokenizer as tokenizer.json writes it.
        control: strings of the control tokens.
        name: for error messages.

    """
    from tokenizers import AddedToken, Tokenizer

    vocabulary = described["model"]["vocab"]  # a mapping, or for Unigram a list of pairs
    if isinstance(vocabulary, list):
        vocabulary = {piece for piece, _ in vocabulary}
    kept = []
    for token in described["added_tokens"]:
        if token["content"] not in control:
            kept.append(token)
        elif token["content"] not in vocabulary:
            # Ids of added tokens are counted up: an unreachable name keeps the place.
            kept.append(token | {"content": f"{_SENTINEL}{token['id']}", "normalized": False})
    changed = {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}
    plain = Tokenizer.from_str(json.dumps(described | changed))
    plain.add_special_tokens([AddedToken(_SENTINEL, normalized=False)])
    sentinel = plain.token_to_id(_SENTINEL)
    if sentinel is None or any(
        plain.token_to_id(token["content"]) != token["id"] for token in kept
    ):
        raise ModelError(
            name, "the ids of its added tokens have gaps", "save it anew with transformers"
        )
    return plain, sentinel
