"""Encoder-decoders: what is written and scored side by side is what Transformers gives alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from metier.errors import ModelError
from metier.model import seq2seq
from metier.model.generate import Engine
from metier.model.load import is_encoder_decoder, load_base, starter_path
from metier.model.seq2seq import Seq2SeqDecoder, cache_bytes, encode, head_scale
from metier.text.template import Renderer
from tests.seq2seq_bases import SEQ2SEQ, write_seq2seq

ASKED = ["a", "import the module " * 20, "x y z", "class " * 7, "what is a loop?", "b"]
ANSWERS = ["yes", "a much longer answer", "no"]
CLOSE = 1e-9


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_seq2seq(tmp_path_factory.mktemp(family), family) for family in SEQ2SEQ}


@pytest.fixture(params=SEQ2SEQ)
def path(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


def engine_of(path: Path, longest: int = 12, **settings: Any) -> Engine:
    base = load_base(str(path), torch.float64, "cpu")
    renderer = Renderer(base.tokenizer, "plain", encoder=True)
    return Engine(base.model, renderer, longest, **settings)


def oracle(path: Path) -> Any:
    """Transformers' own model, with its plainest attention."""
    return AutoModelForSeq2SeqLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def prompts_of(engine: Engine) -> list[list[int]]:
    return [engine.renderer.prompt([{"role": "user", "content": text}]) for text in ASKED]


def test_the_scale_before_the_head_is_that_of_the_family(bases: dict[str, Path]) -> None:
    found = {family: head_scale(load_base(str(path)).model) for family, path in bases.items()}
    assert found == {"T5-1.0": 32**-0.5, "T5-1.1": 1.0, "MT5": 1.0}


def test_a_head_that_does_something_else_is_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="unknown way"):
        head_scale(_halved(bases["T5-1.1"]))


def _halved(path: Path) -> Any:
    """A model that scales its logits in a way of its own, behind the head."""
    model: Any = load_base(str(path)).model
    usual = model.forward

    def forward(**inputs: Any) -> Any:
        found = usual(**inputs)
        found.logits = found.logits / 2
        return found

    model.forward = forward
    return model


@pytest.mark.parametrize("budget", [16_384, 80])
def test_what_is_written_is_what_transformers_writes(path: Path, budget: int) -> None:
    """Of every row, however rows are batched; some stop, some are cut."""
    engine, plain = engine_of(path, batch_tokens=budget), oracle(path)
    prompts = prompts_of(engine)
    # Half of the rows must stop before others: what one of them writes is made a stop.
    first = engine.generate_ids(prompts)
    engine.renderer.stop_ids |= {first[1][3]}
    engine = Engine(engine.model, engine.renderer, 12, batch_tokens=budget)
    found = engine.generate_ids(prompts)
    for prompt, ids in zip(prompts, found, strict=True):
        expected = plain.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(engine.renderer.stop_ids),
        )
        assert ids == expected[0].tolist()[1:]
    assert len({len(ids) for ids in found}) > 1
    assert len({tuple(ids) for ids in found}) > 3


def test_logits_of_rows_side_by_side_are_those_of_each_alone(path: Path) -> None:
    engine, plain = engine_of(path), oracle(path)
    prompts = prompts_of(engine)
    decoder = Seq2SeqDecoder(engine.model, prompts)
    written = torch.tensor([[5, 9, 7], [9, 8, 6], [7, 7, 7], [5, 5, 8], [4, 4, 4], [6, 5, 4]])
    for tokens in written.T:
        decoder.push(tokens)
    decoder.keep(torch.tensor([1, 4]))
    decoder.push(torch.tensor([11, 12]))
    for place, row in enumerate((1, 4)):
        ids = [0, *written[row].tolist(), 11 + place]
        with torch.no_grad():
            expected = plain(
                input_ids=torch.tensor([prompts[row]]), decoder_input_ids=torch.tensor([ids])
            ).logits[0, -1]
        assert float((decoder.logits[place] - expected).abs().max()) < CLOSE


def test_control_unmasked_padding_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(path)
    prompts = prompts_of(engine)
    honest = Seq2SeqDecoder(engine.model, prompts).logits
    usual = encode

    def unmasked(model: Any, rows: Any) -> seq2seq.Encoded:
        found = usual(model, rows)
        return seq2seq.Encoded(found.states, torch.ones_like(found.mask))

    monkeypatch.setattr(seq2seq, "encode", unmasked)
    assert float((Seq2SeqDecoder(engine.model, prompts).logits - honest).abs().max()) > 1e-3


@pytest.mark.parametrize("budget", [16_384, 40])
def test_log_probabilities_are_those_of_transformers(path: Path, budget: int) -> None:
    engine, plain = engine_of(path, batch_tokens=budget), oracle(path)
    encode_text = engine.renderer.tokenizer.encode
    pairs = [(p, [*encode_text(a), 1]) for p in prompts_of(engine) for a in ANSWERS]
    found = engine.logprobs(pairs)
    for (prompt, answer), value in zip(pairs, found, strict=True):
        with torch.no_grad():
            loss = plain(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
        assert value == pytest.approx(-float(loss) * len(answer), rel=1e-5)
    assert len(set(found)) == len(found)


def test_a_prompt_in_several_pairs_is_read_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, usual = engine_of(path), encode
    read: list[int] = []

    def counting(model: Any, rows: Any) -> seq2seq.Encoded:
        read.append(len(rows))
        return usual(model, rows)

    monkeypatch.setattr(seq2seq, "encode", counting)
    prompts = prompts_of(engine)[:2]
    engine.logprobs([(prompt, [5, 1]) for prompt in prompts] * 3)
    assert sum(read) == 2


def test_a_stream_is_the_whole_answer(path: Path) -> None:
    engine = engine_of(path)
    chat = [{"role": "user", "content": "what is a loop?"}]
    (expected,) = engine.generate([chat])
    assert "".join(engine.stream(chat)) == expected.text
    assert expected.completion_tokens == 12


def test_bytes_of_the_cache_are_those_that_are_kept(path: Path) -> None:
    engine = engine_of(path)
    prompts = prompts_of(engine)
    decoder = Seq2SeqDecoder(engine.model, prompts)
    cache: Any = decoder._cache
    layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    kept = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    kept += decoder._encoded.states.nbytes
    tokens = decoder._encoded.mask.numel() + len(prompts)
    # What was encoded is not kept of tokens that are written.
    own = len(prompts) * 32 * engine.model.dtype.itemsize
    assert cache_bytes(engine.model) * tokens == kept + own


def test_which_bases_have_an_encoder(bases: dict[str, Path]) -> None:
    assert all(is_encoder_decoder(str(path)) for path in bases.values())
    assert not is_encoder_decoder(str(starter_path()))


def changed(path: Path, directory: Path, **values: Any) -> Path:
    """A copy of a base with another config."""
    shutil.copytree(path, directory)
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_a_base_that_does_not_say_where_answers_begin_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(bases["T5-1.1"], tmp_path / "base", decoder_start_token_id=None)
    with pytest.raises(ModelError, match="names no decoder_start_token_id") as caught:
        load_base(str(path))
    assert "config.json" in caught.value.place


def test_an_encoder_decoder_of_another_family_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    path = changed(bases["T5-1.1"], tmp_path / "base", model_type="bart")
    with pytest.raises(ModelError, match="encoder-decoder of the family bart"):
        load_base(str(path))


def test_the_head_is_its_own_or_the_embeddings(bases: dict[str, Path]) -> None:
    """As in the checkpoint, whatever the config says of ties."""
    for family, path in bases.items():
        model: Any = load_base(str(path)).model
        tied = model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()
        assert tied == (family == "T5-1.0")


def test_bfloat16_gives_what_float32_gives_but_for_rounding(path: Path) -> None:
    base = load_base(str(path), torch.float32, "cpu")
    renderer = Renderer(base.tokenizer, "plain", encoder=True)
    prompts = prompts_of(Engine(base.model, renderer, 4))
    expected = Seq2SeqDecoder(base.model, prompts).logits
    found = Seq2SeqDecoder(base.model.bfloat16(), prompts).logits
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert torch.allclose(found.float(), expected, atol=0.05 * float(expected.abs().max()))


def test_loading_says_nothing_that_a_person_could_not_use(
    bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    load_base(str(bases["T5-1.1"]))
    found = capfd.readouterr()
    assert found.out + found.err == ""
