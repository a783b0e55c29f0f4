"""The engine says what transformers' generate says, however requests are batched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from scipy import stats

from metier.errors import DataError, ModelError
from metier.model import decoder
from metier.model.adapters import add_adapter
from metier.model.generate import Engine, _Draw
from metier.model.load import Base
from metier.records import Completion, Generator, Message
from metier.task import Lora, Training
from metier.text.template import Renderer

STARTS = [
    "Once upon a time",
    "The dog",
    "Lily and Tom went to the park. They saw a big red ball under the tree, and Tom said:",
    "One day, a cat wanted",
    "She",
    "Once upon a time, there was a little girl named Lily. She loved to play outside. One day",
    "Once upon a time, there was a little girl named Lily. She loved to play outside. But her mom",
    "Once upon a time",
]
CHATS: list[list[Message]] = [[{"role": "user", "content": text}] for text in STARTS]
NEW = 40


@pytest.fixture(scope="module")
def stopping(base: Base) -> Renderer:
    """A renderer that takes a full stop for the end of an answer, so that rows end early."""
    renderer = Renderer(base.tokenizer, "plain")
    renderer.stop_ids |= {base.tokenizer.encode("a.")[-1]}
    return renderer


def oracle(model: Any, prompt: list[int], stops: frozenset[int], new: int = NEW) -> list[int]:
    """Ids that transformers' own generate writes for one prompt alone."""
    ids = torch.tensor([prompt])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=0,
    )
    result: list[int] = written[0, len(prompt) :].tolist()
    return result


@pytest.fixture(scope="module")
def expected(base: Base, stopping: Renderer) -> list[list[int]]:
    return [oracle(base.model, stopping.prompt(chat), stopping.stop_ids) for chat in CHATS]


@pytest.mark.parametrize("budget", [1, 200, 100_000])
def test_ids_are_those_of_transformers(
    base: Base, stopping: Renderer, expected: list[list[int]], budget: int
) -> None:
    engine = Engine(base.model, stopping, NEW, batch_tokens=budget)
    assert engine.generate_ids([stopping.prompt(chat) for chat in CHATS]) == expected
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 3, "rows leave their batch at different times"


def test_text_batched_is_text_alone_in_any_order(base: Base, stopping: Renderer) -> None:
    engine: Generator = Engine(base.model, stopping, NEW)
    together = engine.generate(CHATS)
    assert [engine.generate([chat])[0] for chat in CHATS] == together
    order = random.Random(0).sample(range(len(CHATS)), len(CHATS))
    shuffled = engine.generate([CHATS[i] for i in order])
    assert shuffled == [together[i] for i in order]
    assert engine.generate([]) == []


def test_the_oracle_sees_a_wrong_cache(
    base: Base, stopping: Renderer, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: keys and values of prompts one place off, the last one lost."""
    right = decoder._Buffers.place

    def wrong(self: Any, row: int, count: int, keys: Any, values: Any) -> None:
        right(self, row, count, keys.roll(1, 1), values.roll(1, 1))

    monkeypatch.setattr(decoder._Buffers, "place", wrong)
    engine = Engine(base.model, stopping, NEW)
    assert engine.generate_ids([stopping.prompt(chat) for chat in CHATS]) != expected


def test_a_completion_counts_its_tokens(base: Base, stopping: Renderer) -> None:
    short, long = Engine(base.model, stopping, 4), Engine(base.model, stopping, 100)
    prompt = stopping.prompt(CHATS[0])
    cut = short.generate(CHATS[:1])[0]
    assert (cut.finished, cut.completion_tokens, cut.prompt_tokens) == (False, 4, len(prompt))
    whole = long.generate(CHATS[:1])[0]
    ids = oracle(base.model, prompt, stopping.stop_ids, 100)
    assert whole == Completion(stopping.answer(ids), len(prompt), len(ids), True)
    assert "." not in whole.text, "the stop token is no part of the answer"


def test_a_prompt_that_leaves_no_room_is_refused(base: Base, renderer: Renderer) -> None:
    engine = Engine(base.model, renderer, 12)
    assert engine.context == 512
    assert len(engine.generate_ids([[5] * 500])[0]) <= 12
    with pytest.raises(ModelError, match="at most 512"):
        engine.generate_ids([[5], [5] * 501])
    with pytest.raises(ModelError, match="at most 512"):
        list(engine.stream([{"role": "user", "content": "dog " * 500}]))
    with pytest.raises(ModelError, match="is empty"):
        engine.generate_ids([[]])


def test_common_starts_are_read_once(base: Base, stopping: Renderer) -> None:
    start = stopping.prompt(CHATS[2])
    prompts = [[*start, *stopping.tokenizer.encode(text, "text")] for text in STARTS[:6]]
    read = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal read
        read += kwargs["input_ids"].numel()

    hook = base.model.register_forward_pre_hook(count, with_kwargs=True)
    engine = Engine(base.model, stopping, 1)
    try:
        written = engine.generate_ids(prompts)
    finally:
        hook.remove()
    alone = max(len(prompt) - len(start) for prompt in prompts) * len(prompts)
    assert read <= len(start) + alone < sum(map(len, prompts))
    assert written == [oracle(base.model, p, stopping.stop_ids, 1) for p in prompts]


def test_dropout_is_off_and_the_mode_restored(base: Base, stopping: Renderer) -> None:
    model = add_adapter(deepcopy(base.model), "lora", Training(lora=Lora(rank=4, dropout=0.5)), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    engine = Engine(model, stopping, NEW)
    model.eval()
    expected = engine.generate(CHATS)
    model.train()
    assert engine.generate(CHATS) == expected
    assert "".join(engine.stream(CHATS[0])) == expected[0].text
    assert model.training
    assert all(p.grad is None for p in model.parameters())


COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES: dict[str, Any] = {
    "grouped heads": lambda: transformers.LlamaConfig(**COMMON),
    "sliding window": lambda: transformers.MistralConfig(**COMMON, sliding_window=8),
    "mixed windows, soft cap": lambda: transformers.Gemma2Config(
        **COMMON, head_dim=8, sliding_window=8
    ),
    "learned positions": lambda: transformers.GPT2Config(**GPT, bos_token_id=1, eos_token_id=2),
    "linear bias": lambda: transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4
    ),
    "experts": lambda: transformers.MixtralConfig(
        **COMMON, num_local_experts=4, num_experts_per_tok=2
    ),
    "convolutions": lambda: transformers.Lfm2Config(
        **COMMON, layer_types=["conv", "full_attention"]
    ),
}


def tiny(config: Any, seed: int = 0) -> Any:
    """A random model whose next token depends on all it has read."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_continued_rightly(base: Base, family: str) -> None:
    model = tiny(FAMILIES[family]())
    renderer = Renderer(base.tokenizer, "plain")
    draw = random.Random(1)
    start = [draw.randrange(4, 97) for _ in range(20)]
    prompts = [[draw.randrange(4, 97) for _ in range(n)] for n in (1, 2, 9, 17, 30)]
    prompts += [start, *(start + prompt for prompt in prompts[:3])]
    engine = Engine(model, renderer, 10)
    expected = [oracle(model, prompt, renderer.stop_ids, 10) for prompt in prompts]
    assert engine.generate_ids(prompts) == expected
    assert engine.generate_ids(prompts[5:]) == expected[5:], "with a common start"
    assert engine.generate_ids(prompts[:1]) == expected[:1], "with nothing read before"
    pairs = [(prompts[i], continuation) for i in (2, 5) for continuation in ([4, 5], [6])]
    assert engine.logprobs(pairs) == pytest.approx([plainly(model, *p) for p in pairs], abs=1e-3)


@pytest.mark.parametrize(
    ("family", "apart"),
    [("grouped heads", True), ("experts", True), ("sliding window", False), ("linear bias", False)],
)
def test_a_common_start_is_kept_once_where_that_can_be(family: str, apart: bool) -> None:
    """A family that attends in a way of its own, as with a linear bias, reads it in every row."""
    model = tiny(FAMILIES[family]())
    start = list(range(4, 34))
    prompts = [[*start, 5, 6], [*start, 7]]
    rows = decoder.Decoder(model, prompts, 0)
    assert rows._cache.get_seq_length() == (3 if apart else 33)
    assert decoder.room(model, prompts, 10) == ([12, 11] if apart else [42, 41])


def test_a_memory_of_its_own_is_refused(renderer: Renderer) -> None:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ModelError, match="a way of its own"):
        Engine(tiny(config), renderer, 4).generate_ids([[5, 6]])


# Streaming


def finish(stream: Any) -> tuple[list[str], Completion]:
    """Pieces, and the completion that the generator returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as stop:
            return pieces, stop.value


def test_a_greedy_stream_is_the_batched_answer(base: Base, stopping: Renderer) -> None:
    engine = Engine(base.model, stopping, NEW)
    for chat, expected in zip(CHATS, engine.generate(CHATS), strict=True):
        pieces, completion = finish(engine.stream(chat))
        assert completion == expected
        assert "".join(pieces) == expected.text
        assert all(pieces)


def test_drawing_repeats_with_its_seed(base: Base, renderer: Renderer) -> None:
    engine = Engine(base.model, renderer, 30)

    def draw(seed: int | None, temperature: float = 1.0, top_p: float = 1.0) -> str:
        return "".join(engine.stream(CHATS[0], temperature=temperature, top_p=top_p, seed=seed))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in (1, 2, 3, None, None)}) == 5
    greedy = engine.generate(CHATS[:1])[0].text
    assert draw(1, temperature=0.0) == draw(1, top_p=1e-6) == draw(1, temperature=1e-4) == greedy


def test_stop_strings_and_length_end_a_stream(base: Base, renderer: Renderer) -> None:
    engine = Engine(base.model, renderer, 30)
    whole = engine.generate(CHATS[:1])[0].text
    stop = whole[10:14]
    pieces, completion = finish(engine.stream(CHATS[0], stop=(stop,)))
    assert "".join(pieces) == completion.text == whole[: whole.index(stop)].rstrip()
    assert completion.finished
    _, cut = finish(engine.stream(CHATS[0], max_new_tokens=5))
    assert (cut.finished, cut.completion_tokens) == (False, 5)
    assert whole.startswith(cut.text)


def test_stop_strings_end_a_batch_as_they_end_a_stream(base: Base, renderer: Renderer) -> None:
    engine = Engine(base.model, renderer, 30)
    whole = engine.generate(CHATS)
    engine.stop = (whole[0].text[10:14], ". ")
    answers = engine.generate(CHATS)
    assert answers == [finish(engine.stream(chat, stop=engine.stop))[1] for chat in CHATS]
    assert all(long.text.startswith(short.text) for long, short in zip(whole, answers, strict=True))
    assert any(answer.finished for answer in answers)
    written = sum(answer.completion_tokens for answer in answers)
    assert written < sum(answer.completion_tokens for answer in whole), "nobody waits for the rest"


@pytest.mark.parametrize("space", ["", "\n", " \n\n"])
def test_white_space_before_an_answer_is_no_stop(
    base: Base, renderer: Renderer, space: str
) -> None:
    engine = Engine(base.model, renderer, 30)
    engine.stop = ("\n",)
    encode = renderer.tokenizer.encode
    assert not engine._reached(encode(f"{space}a word", "text"))
    assert engine._reached(encode(f"{space}a word\n", "text"))


def test_a_suspended_stream_leaves_no_mode_behind(base: Base, renderer: Renderer) -> None:
    stream: Iterator[str] = Engine(base.model, renderer, 30).stream(CHATS[0])
    next(stream)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    draw = _Draw(temperature, 1.0, seed=0)
    counts = torch.bincount(torch.tensor([draw(LOGITS) for _ in range(4000)]), minlength=5)
    weights = [(value / temperature).exp().item() for value in LOGITS.double()]
    expected = [4000 * weight / sum(weights) for weight in weights]
    assert stats.chisquare(counts.numpy(), expected).pvalue > 0.001
    assert stats.chisquare(counts.numpy(), [800] * 5).pvalue < 0.001, "the test has power"


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38, 1e-6, 1e-5])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    for logits in (LOGITS, LOGITS - 100, LOGITS * 1e4):
        assert _Draw(temperature, 1.0, seed=0)(logits) == 0


def test_the_nucleus_is_the_smallest_set_with_the_share() -> None:
    """Probabilities of the five tokens are 0.46, 0.17, 0.06, 0.02 and 0.28."""
    for top_p, tokens in [
        (0.0, {0}),
        (0.4, {0}),
        (0.5, {0, 4}),
        (0.8, {0, 4, 1}),
        (0.95, {0, 4, 1, 2}),
    ]:
        draw = _Draw(1.0, top_p, seed=0)
        assert {draw(LOGITS) for _ in range(600)} == tokens


# Log-probabilities


def plainly(model: Any, prompt: Any, continuation: Any) -> float:
    """The definition, one token at a time."""
    total = 0.0
    for place, token in enumerate(continuation):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *continuation[:place]]])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    return total


@pytest.mark.parametrize("budget", [1, 120, 100_000])
def test_logprobs_are_those_of_the_definition(base: Base, renderer: Renderer, budget: int) -> None:
    encode = base.tokenizer.encode
    prompts = [renderer.prompt(chat) for chat in CHATS[:4]]
    pairs = [(p, encode(text, "text")) for p in prompts[:2] for text in ("a dog.", "Lily", "")]
    pairs += [(prompts[2], encode("and then", "text")), ([1], encode("Once upon a time"))]
    random.Random(0).shuffle(pairs)
    expected = [plainly(base.model, *pair) for pair in pairs]
    engine = Engine(base.model, renderer, 1, batch_tokens=budget)
    assert engine.logprobs(pairs) == pytest.approx(expected, abs=2e-3)
    assert engine.logprobs(pairs[::-1]) == pytest.approx(expected[::-1], abs=2e-3)
    assert engine.logprobs([]) == []


def test_logprobs_refuse_what_cannot_be_scored(base: Base, renderer: Renderer) -> None:
    engine = Engine(base.model, renderer, 1)
    with pytest.raises(ModelError, match="is empty"):
        engine.logprobs([([], [5])])
    with pytest.raises(ModelError, match="at most 512"):
        engine.logprobs([([5] * 500, [5] * 13)])


def test_a_chat_that_is_none_is_bad_data(base: Base, renderer: Renderer) -> None:
    with pytest.raises(DataError):
        Engine(base.model, renderer, 1).generate([[]])
