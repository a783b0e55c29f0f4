"""A tagging head answers alone as together, and is saved so that plain Transformers can use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from metier.errors import ModelError
from metier.model.adapters import add_adapter, save_adapter
from metier.model.head import save_head, with_head
from metier.model.load import Base, load_base
from metier.model.tagger import TagGenerator, Tagger
from metier.records import Message
from metier.task import Training
from metier.text.tags import class_names, read
from metier.text.template import Renderer
from tests.training.families import write_base

LABELS = class_names(("person", "place"))
TEXTS = [
    "Lily went to the park",
    "a dog and a cat " * 9,
    "",
    " \n",
    "Zoë in 東京 🎉",
    "Tom saw Ben",
]


def chat(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def tagger_of(base: Base, model: Any = None) -> Tagger:
    """A tagger that finds many spans, drawn at random."""
    tagger = Tagger(model or base.model, LABELS)
    torch.nn.init.normal_(tagger.head.weight, generator=torch.Generator().manual_seed(0))
    return tagger.eval()


def test_texts_are_answered_together_as_alone(base: Base, renderer: Renderer) -> None:
    generator = TagGenerator(tagger_of(base), renderer)
    together = generator.generate([chat(text) for text in TEXTS])
    assert [generator.generate([chat(text)])[0] for text in TEXTS] == together
    found = [json.loads(answer.text) for answer in together]
    assert sum(map(bool, found)) >= 3
    assert found[2] == found[3] == {}
    for text, entities in zip(TEXTS, found, strict=True):
        assert all(one in text for texts in entities.values() for one in texts)
    assert [a.prompt_tokens for a in together] == [generator.tokens(chat(t)) for t in TEXTS]


def test_an_untrained_tagger_finds_nothing(base: Base, renderer: Renderer) -> None:
    (answer,) = TagGenerator(Tagger(base.model, LABELS), renderer).generate([chat("Tom")])
    assert answer.text == "{}"


def test_the_second_reading_knows_what_follows(base: Base, renderer: Renderer) -> None:
    """The class of a word may depend on what stands behind it, though the base looks back only."""
    tagger = tagger_of(base)
    readings = [read(renderer, chat(text)) for text in ("Lily ran", "Lily sang")]
    first = [reading.units[0].token for reading in readings]
    once, twice = [], []
    for reading, token in zip(readings, first, strict=True):
        logits = tagger(torch.tensor(reading.ids), [len(reading.ids)])
        once.append(logits[token - len(renderer.prompt(chat(reading.text))) + 1])
        twice.append(logits[token])
    assert torch.allclose(*once)
    assert not torch.allclose(*twice, atol=1e-3)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_what_is_saved_gives_the_same_logits_in_transformers(tmp_path: Path, family: str) -> None:
    """As `docs/tags.md` says: the model as it is, and the weights of the head put on it."""
    base = load_base(str(write_base(tmp_path / "base", family)), torch.float32, device="cpu")
    tagger = tagger_of(base)
    base.model.save_pretrained(tmp_path / "arm")
    save_head(tagger, tmp_path / "arm")
    labels = json.loads((tmp_path / "arm" / "labels.json").read_text())
    model = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "arm", num_labels=len(labels)
    ).eval()
    getattr(model, "score" if family == "Llama" else "classifier").load_state_dict(
        load_file(tmp_path / "arm" / "head.safetensors")
    )
    ids = read(Renderer(base.tokenizer, "plain"), chat("Tom saw Zoë in Rome")).ids
    with torch.no_grad():
        expected = tagger(torch.tensor(ids), [len(ids)])
        found = model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert labels == list(LABELS)
    assert expected.abs().max() > 0.1


def test_an_adapter_with_its_head_gives_the_same_logits_in_peft(
    stories260k: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = load_base(str(stories260k), torch.float32, device="cpu")
    model = add_adapter(base.model, "lora", Training(), 0, range(0))
    tagger = tagger_of(base, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path, base)
    save_head(tagger, tmp_path)
    ids = torch.tensor(read(Renderer(base.tokenizer, "plain"), chat("Tom saw Ben")).ids)
    with torch.no_grad():
        expected = tagger(ids, [len(ids)])
        plain = transformers.AutoModelForCausalLM.from_pretrained(stories260k)
        loaded = PeftModel.from_pretrained(plain.float(), tmp_path).eval()
        hidden = loaded(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0]
        head = load_file(tmp_path / "head.safetensors")
        found = hidden @ head["weight"].T + head["bias"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=2e-3)
    assert expected.abs().max() > 10


def test_a_head_comes_back_or_is_refused(base: Base, renderer: Renderer, tmp_path: Path) -> None:
    tagger = tagger_of(base)
    save_head(tagger, tmp_path)
    chats = [chat(text) for text in TEXTS]
    again = TagGenerator(with_head(Tagger, base.model, tmp_path), renderer)
    assert again.generate(chats) == TagGenerator(tagger, renderer).generate(chats)
    (tmp_path / "labels.json").write_text('["O"]')
    with pytest.raises(ModelError, match="no head that fits"):
        with_head(Tagger, base.model, tmp_path)
