"""A given base is trained further: whole or with an adapter, exact, measured, and usable after."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier import runs
from metier.data.stream import Source, TokenFile, pass_weights, write_tokens
from metier.errors import ConfigError, DataError, ModelError
from metier.model.adapters import load_adapter
from metier.model.load import Base, load_base
from metier.text.tokenizer import Tokenizer
from metier.training.corpus import Corpus
from metier.training.held_out import HeldOut
from metier.training.loop import Loop, Plan
from metier.training.mixture import Mixture
from metier.training.pretrain import window_loss
from metier.training.pretrain_config import PretrainConfig
from metier.training.scoring import Scorer
from tests.training.families import write_base
from tests.training.test_pretrain import Told, recipe, run, weights

LORA = {"rank": 4, "alpha": 8}
DOMAIN = ("quark", "gluon", "lepton", "boson", "spin", "decays", "into", "binds", "flavour", "mass")
SOURCES = [
    {"name": "domain", "files": ["domain.jsonl"], "held_out": 0.2},
    {"name": "first", "files": ["first.jsonl"], "weight": 0},
]
HALVES = [{"name": name, "files": ["first.jsonl"], "share": 0.5} for name in "ab"]


def further(directory: Path, given: Path | str, **changes: Any) -> Path:
    """A recipe that goes on with a base, on words that it does not know."""
    draw = random.Random(1)
    rows = [{"text": " ".join(draw.choices(DOMAIN, k=60)) + ".\n"} for _ in range(80)]
    directory.mkdir(exist_ok=True)
    (directory / "domain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"shape": None, "base": str(given), "sources": SOURCES, **changes}
    return recipe(directory, **json.loads(json.dumps(values)))  # YAML aliases are refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base made by this very program, its weights in float32."""
    directory = tmp_path_factory.mktemp("base")
    made = run(recipe(directory), directory / "out")
    wide = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    wide.save_pretrained(directory / "wide")
    AutoTokenizer.from_pretrained(made).save_pretrained(directory / "wide")
    return directory / "wide"


@pytest.fixture(scope="module")
def full(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("full")
    return run(further(directory, base, learning_rate=0.01), directory / "out")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("lora")
    return run(further(directory, base, adapter=LORA, learning_rate=0.02), directory / "out")


def told(model: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((model / "training.json").read_text())["held_out"]
    return {row["source"]: row for row in rows}


def recomputed(model: Path, directory: Path) -> float:
    """Bits per byte of the domain's windows with the weights as they lie on the disk."""
    (windows,) = (
        json.loads(path.read_text())["windows"]
        for path in directory.glob("held-out-*/read.json")
        if "quark" in path.read_text()
    )
    loaded = load_base(str(model), device="cpu")
    part = HeldOut.of("domain", windows, loaded.tokenizer, 64, trained=True)
    return float(part.bits(Scorer(loaded.model)).sum()) / sum(part.sizes)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_it_learns_and_says_what_it_has_forgotten(
    base: Path, method: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(method)
    rows = told(made)
    assert rows["domain"]["verdict"] == "better"
    assert rows["domain"]["high"] < -0.5
    assert rows["first"]["verdict"] == "worse"
    assert not rows["first"]["trained"]
    assert rows["domain"]["before"] == pytest.approx(recomputed(base, made.parent), rel=2e-3)
    assert rows["domain"]["after"] == pytest.approx(recomputed(made, made.parent), rel=2e-3)
    curve = json.loads((made / "training.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [0, 10, 20, 30]
    assert curve[0]["domain"] == rows["domain"]["before"]
    assert curve[0]["first"] < curve[-1]["first"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_written_is_a_base_like_the_one_given(
    base: Path, method: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue(method)
    runs.verify(made)
    model = AutoModelForCausalLM.from_pretrained(made)
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (base, made))
    text = "the quark sat on <|eos|>"
    assert ours(text).input_ids == theirs(text).input_ids
    assert (ours.bos_token, ours.eos_token, ours.chat_template) == (
        theirs.bos_token, theirs.eos_token, theirs.chat_template
    )  # fmt: skip
    assert model.dtype == torch.float32, "that of the given base"
    loaded = load_base(str(made), torch.float32, "cpu")
    ids = torch.tensor([loaded.tokenizer.encode("the quark binds")])
    assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)


def logits(model: Any, tokenizer: Tokenizer) -> torch.Tensor:
    ids = torch.tensor([[0, *tokenizer.encode("quark decays into the cat")]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def test_the_adapter_over_its_base_is_the_merged_base(base: Path, lora: Path) -> None:
    def fresh() -> Base:
        return load_base(str(base), torch.float32, "cpu")

    merged = logits(load_base(str(lora), torch.float32, "cpu").model, fresh().tokenizer)
    ours = logits(load_adapter(fresh(), lora / "adapter"), fresh().tokenizer)
    peft = PeftModel.from_pretrained(fresh().model, str(lora / "adapter"))
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, logits(peft, fresh().tokenizer), rtol=1e-4, atol=1e-4)
    assert (merged - logits(fresh().model, fresh().tokenizer)).abs().max() > 0.5, "control"


def test_an_adapter_changes_its_base_by_a_matrix_of_its_rank(base: Path, lora: Path) -> None:
    first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (base, lora))
    for name, weight in first.named_parameters():
        change = (second.get_parameter(name) - weight).detach()
        if "_proj" in name:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= LORA["rank"]
        else:
            assert not change.any()


KILLED = """
import os
from tests.training.test_continued import *
torch.set_num_threads(1)

class Dies(Told):
    def advance(self, n=1, **info):
        self.steps += int(n)
        if self.steps == 17:
            os.kill(os.getpid(), signal.SIGKILL)

path = Path(sys.argv[1])
run(path, path.parent / "out", Dies())
"""


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_run_goes_on_to_the_same_weights(
    base: Path, tmp_path: Path, method: str, request: pytest.FixtureRequest
) -> None:
    expected = request.getfixturevalue(method)
    changes = {"learning_rate": 0.01} if method == "full" else {"learning_rate": 0.02}
    changes |= {"adapter": LORA} if method == "lora" else {}
    path = further(tmp_path, base, **changes, checkpoint_seconds=0.001)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "out").glob("training-*/checkpoints/step-*16"))
    listener = Told()
    made = run(path, tmp_path / "out", listener)
    assert "going on after step 16" in listener.lines
    assert weights(made) == weights(expected)
    assert told(made) == told(expected), "what was before is that of the base"
    listener = Told()
    assert run(path, tmp_path / "out", listener) == made
    assert listener.lines == [], "nothing was made again"


def test_replay_holds_what_was_known(base: Path, full: Path, tmp_path: Path) -> None:
    replay = {"name": "first", "files": ["first.jsonl"], "share": 0.3, "held_out": 0.2}
    made = run(further(tmp_path, base, learning_rate=0.01, sources=[SOURCES[0], replay]),
               tmp_path / "out")  # fmt: skip
    without, kept = told(full), told(made)
    assert kept["domain"]["verdict"] == "better"
    assert kept["first"]["difference"] < 0.2 * without["first"]["difference"]


def test_the_share_of_the_windows_is_that_of_the_recipe(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(base)
    files = []
    for name, letters, size in (("domain", "ab", 40_000), ("replay", "cd", 400_000)):
        draw = random.Random(size)
        texts = ["".join(draw.choices(letters, k=99)) + "\n" for _ in range(size // 100)]
        path = tmp_path / f"{name}.bin"
        write_tokens(iter(texts), tokenizer.encode_batch, path, bos=0, eos=1, vocabulary=300)
        files.append(TokenFile(path))
    sources = [Source(name="domain", files=("x",)), Source(name="replay", files=("x",), share=0.25)]
    pairs = zip(files, pass_weights(sources, [file.size for file in files]), strict=True)
    mixture = Mixture(list(pairs), (32, 64), 512, 0, tokenizer)
    replayed = {tokenizer.encode(letter)[-1] for letter in "cd"}
    rows = [row for step in range(200) for window in mixture.step(step) for row in window.ids]
    share = np.mean([not replayed.isdisjoint(row.tolist()) for row in rows])
    assert share == pytest.approx(0.25, abs=0.02)


def test_a_step_is_the_mean_over_all_its_windows(base: Path, tmp_path: Path) -> None:
    """However it is packed: against Transformers, window by window, in float64."""
    tokenizer = Tokenizer.load(base)
    texts = (f"the cat {i} sat\non a mat" for i in range(300))
    path = tmp_path / "a.bin"
    write_tokens(texts, tokenizer.encode_batch, path, bos=0, eos=1, vocabulary=300)
    mixture = Mixture([(TokenFile(path), 1.0)], (16, 32, 64), 128, 0, tokenizer)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64) for _ in "ab")
    descent = torch.optim.SGD(ours.parameters(), lr=1.0)
    plan = Plan(steps=1, schedule=lambda _: 1.0, clip=0.0)
    Loop(ours, window_loss(Scorer(ours)), mixture, [descent], plan).run()

    windows = [row for part in mixture.step(0) for row in part.ids]
    assert sorted(map(len, windows)) == [17] * 8 + [33] * 4 + [65] * 2
    total = sum(
        F.cross_entropy(theirs(input_ids=row[None, :-1]).logits[0], row[1:], reduction="sum")
        for row in windows
    )
    (total / sum(len(row) - 1 for row in windows)).backward()  # type: ignore[union-attr]
    for name, parameter in theirs.named_parameters():
        expected = parameter.detach() - parameter.grad
        torch.testing.assert_close(ours.get_parameter(name).detach(), expected)


def test_documents_are_separated_as_the_base_knows_it(
    gpt2: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    """One rule: BOS text EOS, and where no BOS is named, or it is the EOS, text EOS."""
    texts = ["a <|endoftext|> in the text\n", "", "b"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = {"name": "a", "files": ["a.jsonl"], "held_out": 0}
    config = PretrainConfig.parse({"name": "x", "tokens": 1, "sources": [source]}, "test")
    with runs.Run(tmp_path / "out") as here:
        corpus = Corpus.of(here, config, tmp_path, Told())
        for directory, opening in ((gpt2, []), (base, [0])):
            tokenizer = Tokenizer.load(directory)
            file = TokenFile(corpus.tokens(config.sources[0], tokenizer, 1))
            parts = [[*opening, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
            assert file.read(0, file.size).tolist() == [token for part in parts for token in part]
            assert file.text_bytes == len("".join(texts).encode())
    tokenizer = Tokenizer.load(gpt2)
    assert tokenizer.bos_id is None
    assert tokenizer.opening_id == tokenizer.eos_id == 50256
    assert 50256 not in tokenizer.encode(texts[0])


def test_a_family_of_another_kind_is_trained_with_its_own_tokenizer(
    gpt2: Path,
    tmp_path: Path,
) -> None:
    path = further(
        tmp_path, gpt2, tokens=6 * 512, micro_tokens=64, step_lengths=None, warmup_steps=1,
        evaluate_every=3, evaluation_windows=4,
    )  # fmt: skip
    listener = Told()
    made = run(path, tmp_path / "out", listener)
    about = json.loads((made / "training.json").read_text())
    assert about["recipe"]["step_lengths"] == [64] * 8, "what its context holds"
    assert about["learning_rate"] == pytest.approx(0.15 * 5e-4 * (16 / 2000) ** -0.78)
    assert told(made)["domain"]["after"] < told(made)["domain"]["before"]
    assert AutoTokenizer.from_pretrained(made)("quark").input_ids
    assert load_base(str(made)).model.config.model_type == "gpt2"


def test_a_rate_that_never_rises_to_its_peak_is_said(base: Path, tmp_path: Path) -> None:
    for warmup, said in ((9, True), (2, False)):
        listener = Told()
        path = further(tmp_path, base, tokens=5 * 768, warmup_steps=warmup)
        run(path, tmp_path / "out", listener)
        assert (
            any("of its peak: give fewer warmup_steps" in line for line in listener.lines) == said
        )


@pytest.mark.parametrize(
    ("changes", "place", "cause"),
    [
        ({"shape": {"hidden": 32}}, "shape", "beside the base"),
        ({"base": None, "adapter": LORA}, "adapter", "without a base"),
        ({"step_lengths": [128]}, "step_lengths", "128 is above the context of 64"),
        ({"sources": [SOURCES[0] | {"share": 0.3}]}, "sources", "there is no other"),
        ({"sources": [SOURCES[0], *HALVES]}, "sources", "shares of 100%"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], place: str, cause: str
) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        run(further(tmp_path, base, **changes), tmp_path / "out")
    assert caught.value.place == place
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_nowhere_or_damaged_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        run(further(tmp_path, "./nowhere"), tmp_path / "out")
    near = tmp_path / "near"
    near.mkdir()
    for file in base.iterdir():
        (near / file.name).write_bytes(file.read_bytes())
    (near / "model.safetensors").write_bytes(weights(base)[:-100])
    with pytest.raises(ModelError, match="damaged"):
        run(further(tmp_path, "near"), tmp_path / "out")
    settings = (near / "config.json").read_text()
    (near / "config.json").write_text('{"model_type": "t5", "decoder_start_token_id": 0}')
    with pytest.raises(ModelError, match="encoder-decoder"):
        run(further(tmp_path, "near"), tmp_path / "out")
    (near / "config.json").write_text(settings)
    assert not (tmp_path / "out").exists(), "before any text is read"
    (near / "model.safetensors").write_bytes(weights(base))
    path = further(tmp_path, "near")
    for text in ('{"text": "short"}', ""):
        (tmp_path / "domain.jsonl").write_text(text)
        with pytest.raises(DataError, match="less than a window"):
            run(path, tmp_path / "out")


def test_an_encoder_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    given = write_base(tmp_path / "bert", "Bert")
    (given / "model.safetensors").unlink()  # not even its weights are looked for
    path = further(tmp_path / "recipe", given)
    (tmp_path / "recipe" / "domain.jsonl").unlink()
    with pytest.raises(ModelError, match="is an encoder: it predicts masked words"):
        run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
