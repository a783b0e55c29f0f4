"""The README of an export: what it is for, how good it is, how it is asked, what was proven."""

from __future__ import annotations

from metier.evaluation import units
from metier.evaluation.proof import Proof
from metier.evaluation.schema import Verdict

FORMS = {
    "merged": "merged in memory",
    "reloaded": "reloaded by Transformers",
    "served": "served over HTTP",
}
COLUMNS = ("form", "same answer", "tie", "logits differ by")

_ASK = """
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
answer = model.generate(**prompt)[0, {start}:].tolist()
stops = model.generation_config.eos_token_id
print(tokenizer.decode([token for token in answer if token not in stops]).strip())
"""
_MODEL = """from transformers import {model}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {model}.from_pretrained(".", dtype="auto")
"""
_ADAPTER = """import torch
from peft import PeftModel
from transformers import {model}, AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained(".")
base = {model}.from_pretrained("{base}", dtype=torch.{format})  # where it lies
base.generation_config = GenerationConfig.from_pretrained(".")
model = PeftModel.from_pretrained(base, ".").eval()
"""


def card(verdict: Verdict, proof: Proof) -> str:
    """The model card, Markdown."""
    library = "transformers" if proof.kind == "model" else "peft"
    what = "A whole model" if proof.kind == "model" else "An adapter, to be put into its base"
    load = _MODEL if proof.kind == "model" else _ADAPTER
    code = (load + _ASK.rstrip()).format(
        base=proof.base,
        format=proof.number_format,
        model=f"AutoModelFor{'Seq2Seq' if proof.encoder_decoder else 'Causal'}LM",
        # A decoder that has an encoder writes behind one start token alone.
        start=1 if proof.encoder_decoder else 'prompt["input_ids"].shape[1]',
    )
    sections = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags: [metier]\n---",
        f"# {proof.task}: {proof.arm}",
        f"{what}, for the task `{proof.task}` ({verdict.kind}) and nothing else. Base: "
        f"`{proof.base}`, hash `{proof.base_hash[:16]}`, whose licence holds here too. "
        f"Weights in {proof.number_format}; chat template `{proof.template}`.",
        "## How good it is",
        *_score(verdict, proof),
        "## How it is asked",
        f"```python\n{code}\n```",
        f"Answers are greedy and at most {proof.max_new_tokens} tokens long "
        "(`generation_config.json`), as they were measured. A control token that stands in a "
        "message as text steers a model that is asked so; metier reads it as text.",
        "## What was proven",
        *_proven(proof),
    ]
    return "\n\n".join(sections) + "\n"


def _score(verdict: Verdict, proof: Proof) -> list[str]:
    found = next(one for one in verdict.arms if one.arm == proof.arm)
    score = found.score
    text = (
        f"Mean score {units.percent(score.mean)} (95 % interval {units.percent(score.low)} to "
        f"{units.percent(score.high)}) on {verdict.data.test:,} test examples that no arm had "
        "seen, over all seeds; this is the seed with the best validation score."
    )
    return [text, f"The verdict of the run: {verdict.headline}"]


def _proven(proof: Proof) -> list[str]:
    rows = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *results(proof))]
    return [
        f"{asked(proof)} All forms of the model read the same tokens as the arm that the verdict "
        "measured, and answered:",
        "\n".join(rows),
        f"{explained(proof)} `proof.json` has the rest.",
    ]


def results(proof: Proof) -> list[tuple[str, ...]]:
    """A row for each form: see `COLUMNS`."""
    return [
        (
            FORMS[form.name],
            str(form.same),
            str(len(form.ties)),
            _difference(form.largest_difference),
        )
        for form in proof.forms
    ]


def asked(proof: Proof) -> str:
    """Which prompts were asked."""
    left = f" ({proof.left_out} more are empty or too long)" if proof.left_out else ""
    return f"Asked: {len(proof.prompts)} prompts of {proof.source}{left}."


def explained(proof: Proof) -> str:
    """What the columns mean."""
    tie = "from a token on that rounding decides"
    ties = f" A tie is an answer that is another {tie}." if any(f.ties for f in proof.forms) else ""
    return f"Rounding explains a difference of logits of {_difference(proof.bound)} at most.{ties}"


def _difference(value: float | None) -> str:
    return units.MISSING if value is None else f"{value:.2g}"
