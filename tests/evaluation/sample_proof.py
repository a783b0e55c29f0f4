"""A proof as an export writes it."""

from __future__ import annotations

from typing import Any

from metier.evaluation.proof import Asked, Form, Proof, Tie, Weights


def proof(**changes: Any) -> Proof:
    """Of three prompts, one of which differs from a tie on."""
    tie = Tie(prompt="row 2", token=4, gap=0.1)
    values: dict[str, Any] = {
        "task": "routing",
        "arm": "lora",
        "kind": "model",
        "base": "starter",
        "base_hash": "0123456789abcdef" * 4,
        "template": "question-answer",
        "source": "p.csv",
        "prompts": [
            Asked(id=f"row {n}", prompt_tokens=9, answer_tokens=5, compared_tokens=5)
            for n in range(3)
        ],
        "left_out": 1,
        "stop_tokens": ["</s>"],
        "max_new_tokens": 12,
        "noise": 0.125,
        "bound": 0.5,
        "largest_logit": 20.0,
        "number_format": "bfloat16",
        "weights": Weights(tensors=66, merged=49, merge_error=0.2, untouched=17),
        "forms": [
            Form(name="merged", same=2, ties=(tie,), largest_difference=0.13),
            Form(name="reloaded", same=3, largest_difference=0.13),
            Form(name="served", same=3),
        ],
        "made": "2030-01-01T00:00:00Z",
        "device": "cpu",
        "versions": {"metier": "0.1.0"},
        **changes,
    }
    return Proof(**values)
