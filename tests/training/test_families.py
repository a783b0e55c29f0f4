"""Every family and way of tuning: load, train, save, and read by plain Transformers or PEFT."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from metier.model.adapters import add_adapter, load_adapter, save_adapter, unfreeze
from metier.model.decoder import Decoder
from metier.model.head import Classifier, load_head, save_head
from metier.model.load import Base, load_base, starter_path
from metier.model.seq2seq import Seq2SeqDecoder, is_seq2seq
from metier.progress import Progress, Silent
from metier.task import TUNINGS, Lora, Training
from metier.text.template import Renderer
from metier.training import classify, sft
from metier.training.batches import Batch, Row
from metier.training.scoring import Scorer
from metier.training.sft import answer_loss, default_learning_rate, encoder_head_rate, fit
from tests.seq2seq_bases import SEQ2SEQ, write_seq2seq
from tests.training.families import ENCODERS, FAMILIES, write_base
from tests.training.test_sft import rows_of

TRAINING = Training(
    epochs=10, batch_size=6, patience=0, virtual_tokens=4, lora=Lora(rank=4, alpha=8)
)
KINDS = [kind for kind in TUNINGS if kind != "qlora"]
OTHER = {
    "Mistral": "dora",
    "Qwen3": "prefix-tuning",
    "Gemma3Text": "prompt-tuning",
    "Phi": "ia3",
    "GPT2": "pissa",
    "GPTNeoX": "rslora",
}
MATRIX = [("Llama", kind) for kind in KINDS] + [
    (family, kind) for family, other in OTHER.items() for kind in ("full", "lora", other)
]
MATRIX += [("T5-1.0", kind) for kind in ("full", "lora", "rslora", "ia3")]
MATRIX += [("T5-1.1", kind) for kind in ("full", "lora", "dora", "pissa")]
MATRIX += [("MT5", kind) for kind in ("full", "lora")]


@dataclass
class Tuned:
    """What a training left behind."""

    base: Base
    model: Any
    rows: list[Row]
    before: float
    after: float


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    causal = {family: write_base(tmp_path_factory.mktemp(family), family) for family in FAMILIES}
    return causal | {
        family: write_seq2seq(tmp_path_factory.mktemp(family), family) for family in SEQ2SEQ
    }


def load(path: Path) -> Base:
    return load_base(str(path), dtype=torch.float32, device="cpu")


def prepared(path: Path, kind: str, training: Training) -> tuple[Base, Any, list[Row]]:
    base = load(path)
    renderer = Renderer(base.tokenizer, "question-answer", encoder=is_seq2seq(base.model))
    rows = rows_of(renderer, training)
    if TUNINGS[kind].adapter:
        return base, add_adapter(base.model, kind, training, 0), rows
    unfreeze(base.model, training.layers)
    return base, base.model, rows


def tune(path: Path, kind: str, training: Training = TRAINING) -> Tuned:
    """Twenty steps at the default learning rate."""
    base, model, rows = prepared(path, kind, training)
    batch = Batch.of(sorted(rows, key=lambda row: -len(row.ids)))
    score = Scorer(model)
    with torch.no_grad():
        before = answer_loss(score)(batch).item()
    rate = default_learning_rate(model, TUNINGS[kind])
    state = fit(model, answer_loss(score), rows, rows, training, learning_rate=rate, seed=0)
    assert state.step == 20
    model.eval()
    with torch.no_grad():
        after = answer_loss(score)(batch).item()
    return Tuned(base, model, rows, before, after)


def write(tuned: Tuned, kind: str, directory: Path) -> None:
    if TUNINGS[kind].adapter:
        save_adapter(tuned.model, directory, tuned.base)
    else:
        tuned.model.save_pretrained(directory)
        tuned.base.tokenizer.save(directory)


def plain(base: Path, kind: str, directory: Path) -> Any:
    """What the library alone makes of the files."""
    start = base if TUNINGS[kind].adapter else directory
    seq2seq = AutoConfig.from_pretrained(start).is_encoder_decoder
    known = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    model = known.from_pretrained(start, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, directory) if start == base else model).eval()


@torch.inference_mode()
def alone(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of what follows each prompt, one by one and without padding."""
    if is_seq2seq(model):
        start = torch.zeros(1, 1, dtype=torch.long)
        read = [model(input_ids=torch.tensor([p]), decoder_input_ids=start) for p in prompts]
        return torch.stack([found.logits[0, -1] for found in read])
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts])


def ours(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The same through the engine's decoder, side by side."""
    if is_seq2seq(model):
        return Seq2SeqDecoder(model, prompts).logits
    return Decoder(model, prompts, 2).logits


def prompts_of(tuned: Tuned) -> list[list[int]]:
    """Of several lengths, the longest beyond the families' windows."""
    ids = [list(row.ids) for row in tuned.rows[:4]]
    return [ids[0][:1], ids[1], ids[2] + ids[3], ids[3][:5]]


def check(base: Path, kind: str, directory: Path) -> None:
    """Train, write and read again: by PEFT, and by metier."""
    tuned = tune(base, kind)
    assert tuned.after < 0.95 * tuned.before
    write(tuned, kind, directory)
    prompts = prompts_of(tuned)
    found = ours(tuned.model, prompts)
    expected = alone(plain(base, kind, directory), prompts)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, alone(load(base).model, prompts), atol=1e-2)
    if TUNINGS[kind].adapter:
        again = ours(load_adapter(load(base), directory), prompts)
        assert torch.allclose(found, again, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), MATRIX)
def test_what_is_trained_is_what_others_read(
    bases: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    check(bases[family], kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_real_weights(stories260k: Path, tmp_path: Path, kind: str) -> None:
    check(stories260k, kind, tmp_path)


@pytest.mark.parametrize("kind", ["lora", "prefix-tuning"])
def test_the_same_on_the_starter(tmp_path: Path, kind: str) -> None:
    check(starter_path(), kind, tmp_path)


def test_what_is_read_otherwise_is_seen(bases: dict[str, Path], tmp_path: Path) -> None:
    """Control: an adapter whose scale was changed on the disk is not what was trained."""
    write(tune(bases["Llama"], "lora"), "lora", tmp_path)
    tuned = load_adapter(load(bases["Llama"]), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    prompts = [[5, 6, 7]]
    expected = alone(plain(bases["Llama"], "lora", tmp_path), prompts)
    assert not torch.allclose(ours(tuned, prompts), expected, atol=1e-2)


class Interrupted(Silent):
    """Stops a training in its tenth step, as Ctrl-C would."""

    def __init__(self) -> None:
        self.steps = 0

    def advance(self, steps: int = 1, **figures: object) -> None:
        self.steps += steps
        if self.steps == 10:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("family", "kind"), [("Llama", "pissa"), ("Llama", "prompt-tuning"), ("T5-1.1", "lora")]
)
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    kind: str,
) -> None:
    monkeypatch.setattr(sft, "_CHECKPOINT_SECONDS", 0.0)

    def train(directory: Path | None, progress: Progress) -> dict[str, torch.Tensor]:
        _, model, rows = prepared(bases[family], kind, TRAINING)
        loss = answer_loss(Scorer(model))
        rate = default_learning_rate(model, TUNINGS[kind])
        settings: dict[str, Any] = {"learning_rate": rate, "seed": 0, "progress": progress}
        fit(model, loss, rows, rows, TRAINING, directory=directory, **settings)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole = train(None, Silent())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Interrupted())
    resumed = train(tmp_path, Silent())
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_alone_are_trained_in_every_family(
    bases: dict[str, Path], family: str
) -> None:
    training = TRAINING.model_copy(update={"layers": (-1,)})
    for kind in ("full", "lora", "ia3"):
        _, model, _ = prepared(bases[family], kind, training)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names
        assert all(re.search(r"\.(layers|h)\.1\.", name) for name in names), names


LABELS = ("bird", "fish", "tree")
HEADS = [(family, kind) for family in ENCODERS for kind in ("full", "lora")]
HEADS += [("Bert", "dora"), ("Bert", "ia3"), ("Roberta", "rslora"), ("ModernBert", "pissa")]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_base(tmp_path_factory.mktemp(family), family) for family in ENCODERS}


def head_on(path: Path, kind: str) -> tuple[Base, Classifier, list[Row]]:
    base, model, rows = prepared(path, kind, TRAINING)
    labelled = [
        Row(row.ids[: row.trained.index(True)], (False,) * row.trained.index(True), number % 3)
        for number, row in enumerate(rows)
    ]
    return base, Classifier(model, LABELS), labelled


@torch.inference_mode()
def plain_head(base: Path, kind: str, directory: Path, rows: Sequence[Row]) -> torch.Tensor:
    """What docs/heads.md says to do with the files: the library, a row at a time, and a product."""
    start = base if TUNINGS[kind].adapter else directory
    model = AutoModel.from_pretrained(start, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, directory) if start == base else model).eval()
    head = load_file(directory / "head.safetensors")
    hidden = [model(input_ids=torch.tensor([row.ids])).last_hidden_state[0] for row in rows]
    return torch.stack([head["weight"] @ one.mean(0) + head["bias"] for one in hidden])


@torch.inference_mode()
def our_head(classifier: Classifier, rows: Sequence[Row]) -> torch.Tensor:
    """Side by side; the rows stand longest first."""
    batch = Batch.of(rows)
    return classifier.eval()(batch.ids, batch.lengths)


@pytest.mark.parametrize(("family", "kind"), HEADS)
def test_a_head_on_an_encoder_is_what_others_read(
    encoders: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    base, classifier, rows = head_on(encoders[family], kind)
    loss = classify.head_loss(classifier)
    rate = default_learning_rate(classifier.model, TUNINGS[kind])
    head_rate = encoder_head_rate(classifier.model)
    state = fit(
        classifier, loss, rows, rows, TRAINING, learning_rate=rate, seed=0, head_rate=head_rate
    )
    assert state.step == 20
    assert state.best_loss < 0.95 * torch.tensor(3.0).log(), "of equal probabilities"
    rows.sort(key=lambda row: -len(row.ids))
    found = our_head(classifier, rows)
    write(Tuned(base, classifier.model, [], 0, 0), kind, tmp_path)
    save_head(classifier, tmp_path)
    expected = plain_head(encoders[family], kind, tmp_path, rows)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    again = load(encoders[family] if TUNINGS[kind].adapter else tmp_path)
    model = load_adapter(again, tmp_path) if TUNINGS[kind].adapter else again.model
    assert torch.allclose(our_head(load_head(model, tmp_path), rows), found, atol=1e-5)
    untrained = our_head(load_head(load(encoders[family]).model, tmp_path), rows)
    assert not torch.allclose(untrained, found, atol=1e-3), "the encoder itself has learned"
