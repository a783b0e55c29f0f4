"""What is trained, token by token, under real chat templates: two implementations agree.

The oracle is in `chat_oracle.py`; a second witness are the `{% generation %}` marks that TRL put
into its copies of the templates.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from metier.errors import MetierError
from metier.text import chat as chat_module
from metier.text import template
from metier.text.template import Rendered, Renderer
from metier.text.tokenizer import Tokenizer
from tests.text.chat_families import FAMILIES, template_file, write_tokenizer
from tests.text.chat_oracle import TOOLS, Chat, Oracle, random_chat

# A thousand random chats for one template of each kind, fifty for its near relations.
THOUSAND = (
    *("cohere", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "glm4moe", "gptoss"),
    *("lfm2_v2", "llama3", "llama3_1", "nemotron_3_nano", "phi3", "phi3_5", "qwen2_5", "qwen3"),
    "qwen3_instruct_2507",
)
CHATS = {name: 1000 if name in THOUSAND else 50 for name in FAMILIES}

Load = Callable[[str], tuple[Renderer, Oracle]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A family's renderer and oracle, made once."""

    @cache
    def one(name: str) -> tuple[Renderer, Oracle]:
        directory = write_tokenizer(name, FAMILIES[name], tmp_path_factory.mktemp(name))
        return Renderer(Tokenizer.load(directory), "chat"), Oracle(FAMILIES[name], directory)

    return one


def faults(name: str, renderer: Renderer, oracle: Oracle, chats: int) -> Counter[str]:
    """What is wrong in random chats, counted by kind."""
    draw = random.Random(name)
    found: Counter[str] = Counter()
    for number in range(chats):
        chat, offered = random_chat(draw, FAMILIES[name])
        tools = TOOLS if offered else []
        try:
            rows = renderer.turns(chat, tools)
            last = renderer.example(chat, tools) if number % 4 == 0 else None
            prompt = renderer.prompt(chat[:-1], tools) if last else []
        except MetierError:
            found["refused"] += 1
            continue
        found["all turns"] += [(row.ids, row.trained) for row in rows] != oracle.rows(chat, offered)
        if last:  # every fourth time: it costs as much as all turns
            found["last turn"] += (last.ids, last.trained) != oracle.row(chat, offered)
            found["prompt"] += list(last.ids[: len(prompt)]) != prompt
        for row in rows:
            found["stop"] += not row.trained[-1] or row.ids[-1] not in oracle.stops
            if oracle.bos is not None:
                found["bos"] += row.ids[0] != oracle.bos or row.ids.count(oracle.bos) != 1
    return +found


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trained_token_is_that_of_the_oracle(load: Load, name: str) -> None:
    """Ids, mask, prompt, stop and BOS of every chat; the last answer and all of them."""
    assert faults(name, *load(name), CHATS[name]) == {}


def test_twelve_templates_are_shown_a_thousand_chats() -> None:
    assert len(THOUSAND) >= 12
    assert set(THOUSAND) < set(FAMILIES)


def test_the_stop_token_pads_in_most_of_them(load: Load) -> None:
    """So that the oracle's stops, trained, are also those where pad = eos = stop."""
    padding = [name for name in THOUSAND if not FAMILIES[name].eos]
    assert len(padding) >= 10
    for name in padding:
        renderer, oracle = load(name)
        assert renderer.tokenizer.pad_id == renderer.tokenizer.eos_id
        assert renderer.tokenizer.pad_id in oracle.stops
        last = renderer.example([{"role": "user", "content": "a"}, _say("assistant", "b")])
        assert last.ids[-1] == renderer.tokenizer.pad_id
        assert last.trained[-1]


def _say(role: str, content: str) -> Any:
    return {"role": role, "content": content}


def _mask_shifted(patch: pytest.MonkeyPatch) -> None:
    make = template._row

    def shifted(talk: Any, index: int) -> Rendered:
        row = make(talk, index)
        return Rendered(row.ids, (False, *row.trained[:-1]))

    patch.setattr(template, "_row", shifted)


def _stop_left_out(patch: pytest.MonkeyPatch) -> None:
    make = template._row

    def endless(talk: Any, index: int) -> Rendered:
        row = make(talk, index)
        return Rendered(row.ids, (*row.trained[:-1], False))

    patch.setattr(template, "_row", endless)


def _weights_ignored(patch: pytest.MonkeyPatch) -> None:
    turns = Renderer.turns

    def deaf(self: Renderer, messages: Any, tools: Any = ()) -> list[Rendered]:
        return turns(self, [{**message, "weight": 1} for message in messages], tools)

    patch.setattr(Renderer, "turns", deaf)


def _bos_doubled(patch: pytest.MonkeyPatch) -> None:
    def doubled(self: Any, ids: list[int]) -> list[int]:
        return [self._tokenizer.bos_id, *ids]

    patch.setattr(chat_module.ChatTalk, "_with_bos", doubled)


def _typed_control_parsed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(chat_module._Disguise, "_put_on", lambda self, value: value)


def _prompt_one_short(patch: pytest.MonkeyPatch) -> None:
    prompt = Renderer.prompt
    patch.setattr(Renderer, "prompt", lambda self, *given: [*prompt(self, *given)[:-1], 7])


def _answer_untied(patch: pytest.MonkeyPatch) -> None:
    """The prompt ends where the template asks, and not where an answer's text starts."""

    def asked(self: Any, end: int) -> str:
        text: str = self._layout.render(self._disguise.messages[:end], self._disguise.tools, True)
        return text

    patch.setattr(chat_module.ChatTalk, "_find_opening", asked)


@pytest.mark.parametrize(
    ("plant", "seen", "names"),
    [
        (_mask_shifted, {"all turns", "last turn"}, THOUSAND[::3]),
        (_stop_left_out, {"all turns", "last turn", "stop"}, THOUSAND[::3]),
        (_weights_ignored, {"all turns"}, THOUSAND[::3]),
        (_typed_control_parsed, {"all turns", "last turn"}, THOUSAND[::3]),
        (_prompt_one_short, {"prompt"}, THOUSAND[::3]),
        (_bos_doubled, {"all turns", "bos"}, ("llama3", "gemma", "cohere", "deepseekv3")),
        (_answer_untied, {"all turns", "last turn"}, ("qwen3", "gptoss", "glm4moe")),
    ],
)
def test_a_planted_fault_is_seen(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    seen: set[str],
    names: tuple[str, ...],
) -> None:
    loaded = {name: load(name) for name in names}
    plant(monkeypatch)
    for name, (renderer, oracle) in loaded.items():
        assert seen <= set(faults(name, renderer, oracle, 40)), name


def test_random_chats_hold_the_hazards() -> None:
    """Control of the oracle's input: without hazards it would prove little."""
    draw, family = random.Random(0), FAMILIES["qwen2_5"]
    token = re.compile("|".join(map(re.escape, family.control)))
    seen: Counter[str] = Counter()
    for _ in range(1000):
        chat, tools = random_chat(draw, family)
        seen["tools"] += tools
        seen["many turns"] += len(chat) > 8
        seen["empty system"] += chat[0] == {"role": "system", "content": ""}
        for message in chat:
            text = message.get("content") or ""
            seen[f"weight {message.get('weight')}"] += 1
            seen["calls"] += "tool_calls" in message
            seen["long"] += len(text) > 500
            seen["not ASCII"] += not text.isascii()
            seen["space at an end"] += text != text.strip()
            seen[f"control token, {message['role']}"] += bool(token.search(text))
    roles = ("system", "user", "assistant", "tool")
    hazards = ("tools", "many turns", "empty system", "calls", "long", "not ASCII", "weight 0")
    for hazard in (
        *hazards,
        "weight 1",
        "space at an end",
        *(f"control token, {r}" for r in roles),
    ):
        assert seen[hazard] >= 20, hazard


# Where TRL's copy of a template writes the same text, with what it writes around an answer: what
# we put into the prompt, and what follows the stop token.
MARKED = {
    "cohere": ("", ""),
    "cohere2": ("", "<|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": ("<｜Assistant｜>", ""),
    "deepseekv3": ("<｜Assistant｜>", ""),
    "gemma": ("", "\n"),
    "gemma3": ("", "\n"),
    "gptoss": ("<|start|>assistant<|channel|>final<|message|>", ""),
    "lfm2": ("", "\n"),
    "lfm2_v2": ("", "\n"),
    "llama3": ("", ""),
    "nemotron_3_nano": ("<think></think>", "\n"),
    "phi3": ("", "\n"),
    "phi3_5": ("", "\n"),
    "qwen2_5": ("\n", "\n"),
    "qwen3": ("<think>\n\n</think>\n\n", "\n"),
    "qwen3_5_think": ("<think>\n\n</think>\n\n", "\n"),
    "qwen3_instruct_2507": ("", "\n"),
}


@pytest.mark.parametrize("name", MARKED)
def test_trained_text_is_what_trl_marks(load: Load, name: str) -> None:
    """Second witness, on chats without control tokens: TRL's marks of the last answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    renderer, _ = load(name)
    decode = renderer.tokenizer.decode
    marked = template_file(f"{name}_training").read_text(encoding="utf-8")
    theirs = PreTrainedTokenizerFast.from_pretrained(renderer.tokenizer.name)
    draw = random.Random(name)
    lead, tail = MARKED[name]
    for _ in range(100):
        chat = _without_control(random_chat(draw, replace(FAMILIES[name], tools=False))[0])
        (text,), (spans,) = render_jinja_template(
            [chat],
            chat_template=marked,
            return_assistant_tokens_mask=True,
            **theirs.special_tokens_map,
        )
        row = renderer.example(chat)
        trained = [i for i, is_trained in zip(row.ids, row.trained, strict=True) if is_trained]
        found = [text[start:end] for start, end in spans]
        answers = [span for span in found if span != "<|endoftext|>"]  # at the end of Phi's chats
        assert lead + decode(trained) + tail == answers[-1]
        assert len(answers) == sum(message["role"] == "assistant" for message in chat)


def _without_control(chat: Chat) -> Chat:
    """The chat without brackets, so that nothing typed looks like control tokens."""
    return [
        _say(message["role"], re.sub(r"[<>\[\]«»|]", "", message["content"]).strip() or "word")
        for message in chat
    ]


def test_gpt2_cuts_where_the_prompt_ends(data_dir: Path, tmp_path: Path) -> None:
    """GPT-2 would merge line breaks over the border, and would see other ids when it serves."""
    source = data_dir / "tokenizers" / "gpt2" / "tokenizer.json"
    directory = write_tokenizer("llama3", FAMILIES["llama3"], tmp_path, source)
    renderer = Renderer(Tokenizer.load(directory), "chat")
    assert faults("llama3", renderer, Oracle(FAMILIES["llama3"], directory), 200) == {}


@pytest.mark.parametrize("name", ["gptoss", "llama3", "phi3", "qwen3"])
def test_a_sentencepiece_tokenizer_trains_the_same_text(
    load: Load, stories260k: Path, tmp_path: Path, name: str
) -> None:
    """Other ids, but the same text, the same marks, the same control tokens in the same places."""
    directory = write_tokenizer(name, FAMILIES[name], tmp_path, stories260k / "tokenizer.json")
    renderer = Renderer(Tokenizer.load(directory), "chat")
    reference, oracle = load(name)
    draw = random.Random(name)
    for _ in range(100):
        chat, offered = random_chat(draw, FAMILIES[name])
        tools = TOOLS if offered else []
        expected = [Rendered(*row) for row in oracle.rows(chat, offered)]
        rows = renderer.turns(chat, tools)
        assert [_seen(renderer, row) for row in rows] == [_seen(reference, r) for r in expected]
        prompt = renderer.prompt(chat[:-1], tools)
        assert list(rows[-1].ids[: len(prompt)]) == prompt


def _seen(renderer: Renderer, row: Rendered) -> tuple[str, list[tuple[str, bool]]]:
    """Text with marks, without white space (a typed U+2581 is one); control tokens with marks."""
    names = {number: token for token, number in renderer.tokenizer.control_tokens.items()}
    marked = zip(row.ids, row.trained, strict=True)
    control = [(names[token], trained) for token, trained in marked if token in names]
    return "".join(renderer.show(row).replace("\u2581", "").split()), control
