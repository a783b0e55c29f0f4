"""A base in four bits: refused where it cannot be; the real path where bitsandbytes is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from metier.errors import ConfigError, MissingExtraError
from metier.model import quantised
from metier.model.adapters import add_adapter, load_adapter, save_adapter
from metier.model.llama import supports
from metier.model.load import load_base
from metier.model.quantised import arguments, check_four_bit
from metier.task import Lora, Training
from metier.training.batches import Row
from metier.training.scoring import Scorer
from metier.training.sft import answer_loss, fit
from tests.training.families import write_base


def test_a_processor_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes a CUDA device") as caught:
        check_four_bit()
    assert "use lora" in caught.value.remedy
    with pytest.raises(ConfigError, match="takes a CUDA device"):
        load_base("starter", four_bit=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="package 'bitsandbytes' is not installed"):
        check_four_bit()
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())
    check_four_bit()


def test_what_transformers_is_told() -> None:
    told = arguments(torch.bfloat16, torch.device("cuda", 1))
    config = told["quantization_config"]
    assert told["device_map"] == {"": torch.device("cuda", 1)}
    assert config.load_in_4bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")  # bitsandbytes and the kernels it looks for
def test_a_base_in_four_bits_learns_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor, where it is slow but computes the same."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra qlora) is not installed")
    monkeypatch.setattr(quantised, "check_four_bit", lambda: None)
    path = write_base(tmp_path / "base", "Llama", hidden_size=64, intermediate_size=128)

    def load(*, four_bit: bool) -> object:
        return load_base(str(path), torch.float32, "cpu", four_bit=four_bit)

    base, whole = load(four_bit=True), load(four_bit=False)
    assert base.parameters == whole.parameters
    model = add_adapter(base.model, "qlora", Training(lora=Lora(rank=4)), 0)
    assert {type(layer).__name__ for layer in model.modules()} >= {"Linear4bit"}
    assert not supports(model), "its weights are no numbers that can be multiplied"
    row = Row((5, 6, 7, 8, 9, 10), (False, *[True] * 5))
    training = Training(epochs=10, patience=0)
    rows = [row] * 4
    state = fit(model, answer_loss(Scorer(model)), rows, rows, training, learning_rate=0.01, seed=0)
    losses = [point["validation_loss"] for point in state.curve]
    assert losses[-1] < 0.9 * losses[0]
    save_adapter(model, tmp_path / "adapter", base)

    ids = torch.tensor([row.ids])
    again = load_adapter(load(four_bit=True), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, **arguments(torch.float32, torch.device("cpu"))
    )
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        found, expected = again(ids).logits, theirs(ids).logits
        unquantised = whole.model(ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(found, unquantised, atol=0.1)
