import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier.errors import ConfigError
from metier.runs import verify
from metier.training.pretrain import PretrainConfig, pretrain

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "two", "birds", "sang")


def recipe(directory: Path, **changes: object) -> Path:
    """A corpus of two sources and one that is only for evaluation, and a tiny recipe."""
    draw = random.Random(0)
    for name in ("first", "second", "other"):
        lines = [
            json.dumps({"text": "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(8))})
            for _ in range(60)
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    values: dict[str, object] = {
        "name": "tiny",
        "sources": [
            {"name": "first", "files": ["first.jsonl"], "held_out": 0.1},
            {"name": "second", "files": ["second.jsonl"], "weight": 2.0, "held_out": 0.1},
            {"name": "other", "files": ["other.jsonl"], "weight": 0},
        ],
        "shape": {
            "vocabulary": 300, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 48,
            "context": 64,
        },
        "tokens": 30 * 256 * 3,
        "step_lengths": [16, 32, 64],
        "micro_tokens": 256,
        "evaluate_every": 10,
        "warmup_steps": 3,
        **changes,
    }  # fmt: skip
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(path: Path, out: Path) -> Path:
    return pretrain(PretrainConfig.load(path), path.parent, out, dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("pretrain")
    return directory, run(recipe(directory), directory / "out")


def test_the_base_learns_and_loads_in_plain_transformers(trained: tuple[Path, Path]) -> None:
    _, base = trained
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < math.log(300) - 1
    assert tokenizer.eos_token_id == model.config.eos_token_id
    about = json.loads((base / "training.json").read_text())
    assert about["steps"] == 30
    assert about["tokens_seen"] == 30 * 256 * 3
    curve = about["curve"]
    assert set(curve[0]) >= {"first", "second", "other", "step", "validation_loss"}
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"]
    verify(base)


def test_bits_per_byte_is_what_transformers_computes(trained: tuple[Path, Path]) -> None:
    directory, base = trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    nats, size = 0.0, 0
    for line in (directory / "other.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([[0, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=ids[:, :64]).logits[0].float(), -1)
        targets = ids[0, 1:65]
        nats -= logs[: len(targets)].gather(1, targets[:, None]).sum().item()
        size += len(tokenizer.decode(targets).encode())
    curve = json.loads((base / "training.json").read_text())["curve"]
    # Windows there cross documents; the texts are alike, so the figures must nearly agree.
    assert nats / math.log(2) / size == pytest.approx(curve[-1]["other"], rel=0.08)


def test_a_killed_run_ends_with_the_same_weights(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    _, expected = trained
    path = recipe(tmp_path, checkpoint_seconds=0.001)
    script = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from metier.training.pretrain import *\n"
        "p = Path(sys.argv[1]); pretrain(PretrainConfig.load(p), p.parent, p.parent / 'out',"
        " dtype=torch.float32)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as child:
        while not list((tmp_path / "out").glob("training-*/checkpoints/step-*5")):
            assert child.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        child.kill()
    assert not list((tmp_path / "out").glob("model-*"))
    continued = run(path, tmp_path / "out")
    weights = [(base / "model.safetensors").read_bytes() for base in (expected, continued)]
    assert weights[0] == weights[1]


def test_more_tokens_continue_and_another_recipe_starts_anew(tmp_path: Path) -> None:
    path = recipe(tmp_path, tokens=4 * 768)
    run(path, tmp_path / "out")
    longer = run(recipe(tmp_path, tokens=6 * 768), tmp_path / "out")
    assert json.loads((longer / "training.json").read_text())["steps"] == 6
    assert len(list((tmp_path / "out").glob("training-*"))) == 1
    run(recipe(tmp_path, tokens=4 * 768, seed=1), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("training-*"))) == 2


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"shape": {"hidden": 33, "heads": 2}}, "does not divide"),
        ({"step_lengths": [48]}, "no divisor"),
        ({"step_lengths": [128]}, "above the context"),
        ({"sources": [{"name": "a", "files": ["first.jsonl"], "weight": 0}]}, "weight above 0"),
    ],
)
def test_impossible_recipes_are_refused(
    tmp_path: Path, changes: dict[str, object], cause: str
) -> None:
    with pytest.raises(ConfigError, match=cause):
        run(recipe(tmp_path, **changes), tmp_path / "out")
