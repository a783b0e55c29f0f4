"""The README of an export: figures of the verdict and of the proof, and code."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import yaml

from metier.evaluation.card import card
from metier.evaluation.schema import ArmResult, DataSummary, Estimate, Verdict
from tests.evaluation.sample_proof import proof

VERDICT = Verdict(
    task="routing",
    kind="classification",
    decision="ship",
    arm="lora",
    reference="prompt",
    headline="Ship lora: it is better.",
    rule="A rule.",
    reasons=(),
    margin=0.02,
    currency="USD",
    data=DataSummary(train=800, validation=100, test=1200, test_clusters=2),
    arms=(
        ArmResult(
            arm="lora",
            method="lora",
            mode="text",
            base="",
            tuned=True,
            score=Estimate(mean=0.687, low=0.645, high=0.726),
            validation_score=0.7,
            latency_p50=0.1,
            latency_p95=0.2,
            prompt_tokens=9,
            completion_tokens=5,
        ),
    ),
)


def written(**changes: Any) -> str:
    return card(VERDICT, proof(**changes)).replace("\xa0", " ")


def test_it_says_how_good_and_what_was_proven() -> None:
    text = written()
    assert "Mean score 68.7 % (95 % interval 64.5 % to 72.6 %) on 1,200 test examples" in text
    assert "Ship lora: it is better." in text
    assert "| merged in memory | 2 | 1 | 0.13 |" in text
    assert "| served over HTTP | 3 | 0 | – |" in text
    assert "A tie is an answer that is another from a token on that rounding decides." in text
    assert "Base: `starter`, hash `0123456789abcdef`" in text


def test_without_ties_none_is_explained() -> None:
    forms = proof().forms[1:]
    assert "A tie is" not in written(forms=forms)


@pytest.mark.parametrize(("kind", "library"), [("model", "transformers"), ("adapter", "peft")])
def test_its_head_is_yaml_and_its_code_is_python(kind: str, library: str) -> None:
    text = written(kind=kind, weights=None)
    _, head, _ = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == library
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert ("PeftModel" in names) == (kind == "adapter")
    assert ("torch" in names) == (kind == "adapter")
