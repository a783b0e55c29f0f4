"""Export an arm as a directory that others load with nothing of metier, once it is proven."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from metier import runs
from metier.data.split import read_parts
from metier.errors import ExportError, MetierError, RunError
from metier.evaluation import arms, units
from metier.evaluation.card import card
from metier.evaluation.proof import PROOF, Form, Proof, Weights
from metier.model.adapters import load_adapter
from metier.model.generate import Engine
from metier.model.load import load_base, locate
from metier.model.merge import Merged, digests, merge
from metier.model.seq2seq import is_seq2seq, name_own_head, start_id
from metier.progress import Progress, no_weight_bar
from metier.recipes import making, proving, workbench
from metier.recipes.finished import Found, find
from metier.recipes.proving import Prompt, Trial
from metier.recipes.stages import slug
from metier.recipes.workbench import Workbench
from metier.records import input_text
from metier.runs import Run
from metier.task import Arm
from metier.text.template import Renderer
from metier.text.tokenizer import Tokenizer

PROMPTS = 64
"""Prompts of the test part that are asked at most, spread evenly over it."""
_OWN = {"arm.json", "log.jsonl", "training.json", runs.MANIFEST}
_SPARE = 64 * 2**20
_INSTEAD = {
    "classical": "is no language model",
    "remote": "is a model elsewhere",
    "prompt": "is its base as it is, with an instruction before each input",
    "few-shot": "puts training examples into each request",
    "rag": "puts passages into each request",
    "lora+rag": "puts passages into each request",
}


@dataclass(frozen=True)
class _Source:
    """What is asked, and where it is from."""

    words: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class _Plan:
    """What is exported.

    Attributes:
        found: the arm.
        bench: what it was made from.
        whole: whether it becomes one model, or an adapter beside its base.

    """

    found: Found
    bench: Workbench
    whole: bool

    @property
    def base(self) -> str:
        """Name of the base."""
        return making.base_name(self.bench, self.found.arm)

    @property
    def base_hash(self) -> str:
        """Hash of the base that the arm was trained from."""
        manifest = json.loads((self.found.directory / runs.MANIFEST).read_text("utf-8"))
        return str(manifest["inputs"]["base"][0])


@dataclass(frozen=True)
class _Written:
    """What is known of an arm once its model is written and gone.

    Attributes:
        trial: what it answered.
        model: its ``dtype``, ``device`` and ``attention``.
        forms: what was compared with it already.
        weights: of a whole model: what became of them.
        digests: of the weights that were written, by name.

    """

    trial: Trial
    model: Mapping[str, str]
    forms: tuple[Form, ...] = ()
    weights: Weights | None = None
    digests: Mapping[str, str] = field(default_factory=dict)


def export(
    run: Path,
    arm: str | None,
    out: Path | None,
    merged: bool,
    prompts: Path | None,
    progress: Progress,
) -> Path:
    """Export an arm. The arguments are those of `recipes.export`."""
    found = find(run, arm)
    _check_arm(found.arm)
    bench = workbench.load(found.data)
    full = found.arm.method == "full"
    plan = _Plan(found, bench, whole=merged or full)
    target = out or run / "export" / f"{slug(found.arm)}{'-merged' if merged and not full else ''}"
    if target.exists():
        raise RunError(str(target), "exists already", "delete it, or give another --out")
    source = _from_file(bench, prompts) if prompts else _test_inputs(bench, run, progress)
    _remove_leftovers(target)
    about = {"stage": "export", "arm": found.directory.name}
    # A run that goes on sweeps its directory.
    with nullcontext() if out else Run(run), runs.publish(target, about) as directory:
        proof = _make(plan, source, directory, progress)
        runs.write_atomic(directory / PROOF, proof.model_dump_json(indent=1))
        runs.write_atomic(directory / "README.md", card(found.verdict, proof))
    return target


def _check_arm(arm: Arm) -> None:
    """Refuse an arm that is more or less than one model that writes."""
    reason = _INSTEAD.get(arm.method)
    if arm.mode != "text":
        reason = (
            "tags its input instead of writing"
            if arm.mode == "tags"
            else "chooses among labels instead of writing"
        )
    if reason:
        raise ExportError(
            f"arm '{arm.name}'",
            f"{reason}: it is not one model that others could load and ask",
            "serve it with 'metier serve', or export a tuned arm that writes (lora, full) "
            "with --arm",
        )


def _test_inputs(bench: Workbench, run: Path, progress: Progress) -> _Source:
    """Inputs of the test part that the run has opened; their answers stay where they are.

    Nothing is graded and nothing chosen, so this is no opening of the sealed part.
    """
    progress.stage("read the inputs of the test part")
    remedy = "give prompts of your own with --prompts FILE"
    try:
        parts = read_parts(bench.task, bench.base_dir)
    except (MetierError, OSError) as error:
        cause = f"the data of the run cannot be read again ({str(error).splitlines()[0]})"
        raise RunError(str(bench.base_dir), cause, remedy) from None
    opened = [json.loads(file.read_text()) for file in run.glob(f"opening-*/{runs.MANIFEST}")]
    if parts.test_fingerprint not in {one["inputs"]["test"] for one in opened}:
        cause = "the data has changed: its test part is not the one that this run has opened"
        raise RunError(str(bench.base_dir), cause, remedy)
    count = min(PROMPTS, len(parts.test))
    chosen = [parts.test[at * len(parts.test) // count] for at in range(count)]
    words = f"the {len(parts.test):,} inputs of the task's test part"
    return _Source(words, tuple(Prompt(row.id, row.prompt) for row in chosen))


def _from_file(bench: Workbench, file: Path) -> _Source:
    """All inputs of a file of the user's."""
    rows = workbench.read_inputs(bench.task, file)
    return _Source(file.name, tuple(Prompt(row.id, row.prompt) for row in rows))


def _remove_leftovers(target: Path) -> None:
    """Remove what an export to the same place left that was killed."""
    for path in target.parent.glob(f".partial-*-{target.name}"):
        number = re.fullmatch(r"\.partial-(\d+)-.*", path.name)
        if number and not psutil.pid_exists(int(number[1])):
            shutil.rmtree(path, ignore_errors=True)


def _make(plan: _Plan, source: _Source, directory: Path, progress: Progress) -> Proof:
    """Write an export into a directory and prove it."""
    written = _write(plan, source, directory, progress)
    trial = written.trial
    gc.collect()  # the arm's model: what comes now needs its room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = {**written.model, "base": None if plan.whole else str(locate(plan.base))}
    reloaded = proving.reload(trial, directory, model, progress)
    engine = _load(plan, trial, directory)
    if plan.whole:
        _check_bytes(written.digests, digests(engine.model))
    served = proving.serve(trial, engine, plan.bench.task, progress)
    decode = trial.renderer.tokenizer.decode
    return Proof(
        task=plan.found.verdict.task,
        arm=plan.found.arm.name,
        kind="model" if plan.whole else "adapter",
        encoder_decoder=is_seq2seq(engine.model),
        base=Path(plan.base).name if Path(plan.base).is_absolute() else plan.base,
        base_hash=plan.base_hash,
        template=trial.renderer.template,
        source=source.words,
        prompts=trial.asked(),
        left_out=len(source.prompts) - len(trial.prompts),
        stop_tokens=tuple(decode([token]) for token in sorted(trial.renderer.stop_ids)),
        max_new_tokens=trial.max_new_tokens,
        noise=trial.reference.noise,
        bound=trial.reference.bound,
        largest_logit=trial.reference.largest,
        number_format=written.model["dtype"],
        weights=written.weights,
        forms=(*written.forms, reloaded, served),
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=written.model["device"],
        versions=runs.versions(),
    )


def _write(plan: _Plan, source: _Source, directory: Path, progress: Progress) -> _Written:
    """Ask the arm, and write it."""
    progress.stage("load the arm")
    engine = making.build(plan.bench, plan.found.arm, plan.found.directory).engine
    assert engine is not None  # noqa: S101  `_check_arm` has refused arms without one
    prompts = _fitting(engine, source)
    _write_settings(engine, prompts, directory)
    trial = Trial(engine, prompts, progress)
    model: Any = engine.model
    facts = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
    }
    files = (file.stat().st_size for file in plan.found.directory.iterdir())
    weights = (p.numel() * p.element_size() for p in model.parameters())
    _check_room(directory, sum(weights if plan.whole else files) + trial.reference.size)
    if not plan.whole:
        _copy_adapter(plan.found.directory, directory)
        return _Written(trial, facts)
    return _write_whole(_Written(trial, facts), engine, directory, progress)


def _write_whole(
    written: _Written, engine: Engine, directory: Path, progress: Progress
) -> _Written:
    """Write a whole model; an adapter is merged into it first."""
    from peft import PeftModel

    model: Any = engine.model
    forms: tuple[Form, ...] = ()
    if isinstance(model, PeftModel):
        merged = merge(model, progress)
        again = Engine(merged.model, engine.renderer, engine.max_new_tokens)
        forms = (proving.ask(written.trial, again, progress),)
    else:
        found = digests(model)
        merged = Merged(model, (), 0.0, found, found)
    progress.stage("write the model")
    _save(merged.model, engine, directory)
    weights = Weights(
        tensors=len(merged.after),
        merged=len(merged.layers),
        merge_error=merged.error,
        untouched=sum(merged.before[name] == digest for name, digest in merged.after.items()),
    )
    return dataclasses.replace(written, forms=forms, weights=weights, digests=merged.after)


def _fitting(engine: Engine, source: _Source) -> list[Prompt]:
    """The prompts that say something and leave room for an answer."""
    fits = arms.room_in(engine)
    prompts = [one for one in source.prompts if input_text(one.chat).strip() and fits(one.chat)]
    if not prompts:
        raise ExportError(
            source.words,
            "hold no prompt that says something and leaves room for an answer",
            "give prompts of your own with --prompts FILE",
        )
    return prompts


def _write_settings(engine: Engine, prompts: Sequence[Prompt], directory: Path) -> None:
    """Write tokenizer, chat template and generation settings, the first template that fits."""
    renderer = engine.renderer
    served = [renderer.prompt(prompt.chat) for prompt in prompts]
    found: list[list[int]] = []
    for template in renderer.jinja():
        renderer.tokenizer.save(directory, template)
        found = _plain_ids(directory, prompts)
        if found == served:
            break
    else:
        proving.check_ids(renderer, prompts, served, found)
    _settings(engine).save_pretrained(directory)


def _plain_ids(directory: Path, prompts: Sequence[Prompt]) -> list[list[int]]:
    """What plain Transformers makes of the prompts."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    return [
        tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]


def _settings(engine: Engine) -> Any:
    """Settings under which plain Transformers answers as metier does: greedily, and no longer."""
    from transformers import GenerationConfig

    tokenizer = engine.renderer.tokenizer
    config: Any = GenerationConfig
    seq2seq = is_seq2seq(engine.model)
    return config(
        decoder_start_token_id=start_id(engine.model) if seq2seq else None,
        do_sample=False,
        max_new_tokens=engine.max_new_tokens,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=sorted(engine.renderer.stop_ids),
        pad_token_id=tokenizer.pad_id,
    )


def _check_room(directory: Path, needed: int) -> None:
    """Refuse to fill the disk."""
    needed += _SPARE
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise RunError(
            str(directory.parent),
            f"has {units.size(free)} left, and the export needs {units.size(needed)}",
            "make room, or give --out on another disk",
        )


def _copy_adapter(arm: Path, directory: Path) -> None:
    """Copy all files of an arm that are not metier's own."""
    for file in arm.iterdir():
        if file.name not in _OWN:
            shutil.copyfile(file, directory / file.name)


def _save(model: Any, engine: Engine, directory: Path) -> None:
    model.generation_config = _settings(engine)
    with no_weight_bar():
        model.save_pretrained(str(directory))
    name_own_head(model, directory)
    for file in directory.glob("*.safetensors"):  # written for the owner alone
        shutil.copymode(directory / "config.json", file)


def _load(plan: _Plan, trial: Trial, directory: Path) -> Engine:
    """What was exported, as metier loads it, with its own chat template."""
    model: Any = None
    if plan.whole:
        model = load_base(str(directory)).model
    else:
        model = load_adapter(load_base(plan.base), directory)
    renderer = Renderer(Tokenizer.load(directory), "chat", encoder=is_seq2seq(model))
    return Engine(model, renderer, trial.max_new_tokens)


def _check_bytes(written: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse a directory whose weights are not, byte for byte, those that were in memory."""
    names = sorted(written.keys() | found.keys())
    wrong = [name for name in names if written.get(name) != found.get(name)]
    if wrong:
        raise ExportError(
            f"weight {wrong[0]}",
            "is not the same in the directory as it was in memory",
            "nothing was exported; check the disk and export again",
        )
