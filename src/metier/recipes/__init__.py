"""Name to function: what the command line and Python users call, and where stages meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metier.errors import ConfigError
from metier.progress import Progress, Silent

if TYPE_CHECKING:
    from metier.data.audit import Audit
    from metier.evaluation.schema import Verdict
    from metier.recipes.answering import Specialist
    from metier.recipes.overfitting import Overfit
    from metier.recipes.planning import Plan

__all__ = [
    "audit",
    "demo",
    "export",
    "init",
    "overfit",
    "plan",
    "predict",
    "pretrain",
    "run",
    "run_directory",
    "serve",
    "specialist",
    "train",
]


def run_directory(task: str, out: Path | None = None) -> Path:
    """Where a run of a task is kept: `out`, by default ``runs/<task>`` below this directory."""
    return out or Path("runs") / task


def demo(
    name: str = "stdlib",
    out: Path | None = None,
    overrides: Sequence[str] = (),
    budget: float | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Run the whole loop on a built-in task: no network, no accelerator.

    Args:
        name: ``stdlib`` or ``extract``.
        out: run directory; the task.yaml is written into it.
        overrides: ``key=value`` with dotted keys.
        budget: minutes the run may take.
        progress: is told every step.

    """
    import yaml

    from metier.config import overridden
    from metier.data import builtin
    from metier.errors import MetierError, RunError
    from metier.runs import write_atomic
    from metier.task import Task

    values = builtin.task_values(name)
    Task.parse(overridden(values, overrides), f"demo {name}")
    directory = run_directory(str(values["name"]), out)
    task_file = directory / "task.yaml"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if task_file.exists() and task_file.read_text("utf-8") != text:
        raise ConfigError(str(task_file), "is another task", "give the demo another --out")
    before = set(directory.iterdir()) if directory.exists() else None
    write_atomic(task_file, text)
    try:
        return run(task_file, directory, overrides, budget, progress)
    except RunError:  # another process may be at work there
        raise
    except MetierError:
        made = set(directory.iterdir()) - (before or set())
        if made <= {task_file, directory / ".lock"}:  # nothing worth keeping
            for path in made:
                path.unlink()
            if before is None:
                directory.rmdir()
        raise


def init(file: Path, out: Path | None = None, force: bool = False) -> Path:
    """Look at a data file and write a task.yaml for it, each guess explained.

    Args:
        file: JSONL, CSV, TSV, JSON or Parquet.
        out: the task.yaml to write; by default beside `file`.
        force: write over an existing one.

    Raises:
        DataError: the file cannot be understood.
        ConfigError: the task.yaml exists already.

    """
    from metier.data.propose import propose
    from metier.runs import write_atomic

    target = out or file.parent / "task.yaml"
    if target.is_dir():
        target = target / "task.yaml"
    if target.exists() and not force:
        raise ConfigError(str(target), "exists already", "add --force, or give another --out")
    write_atomic(target, propose(file, target.parent))
    return target


def audit(task_file: Path, overrides: Sequence[str] = ()) -> Audit:
    """Say what is in the data of a task, what is wrong with it and what would leak."""
    from metier.data.audit import audit as look
    from metier.recipes.workbench import open_workbench, read_task

    task = read_task(task_file, overrides)
    bench = open_workbench(task, task_file.parent)
    return look(bench.parts, task.kind, task.split.near_duplicate)


def plan(task_file: Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> Plan:
    """Estimate time and memory of every arm before anything runs."""
    from metier.model.device import set_up_processor
    from metier.recipes import making, planning
    from metier.recipes.workbench import open_workbench, read_task

    set_up_processor(progress)
    task = read_task(task_file, overrides)
    planning.check_machine(task)
    making.check_bases(task)
    return planning.plan(open_workbench(task, task_file.parent), progress or Silent())


def run(
    task_file: Path,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    budget: float | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Compare the arms of a task on a sealed test part and decide; goes on where it stopped.

    Args:
        task_file: task.yaml.
        out: run directory; see `run_directory`.
        overrides: ``key=value`` with dotted keys.
        budget: minutes the run may take; by default the task's.
        progress: is told every step.

    Raises:
        MetierError: something in the task, the data or the machine must be mended first.

    """
    from metier.model.device import set_up_processor
    from metier.recipes import experiment
    from metier.task import Task

    set_up_processor(progress)
    directory = run_directory(Task.load(task_file, overrides).name, out)
    return experiment.run(task_file, directory, overrides, budget, progress or Silent())


def train(
    task_file: Path,
    arm: str,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    budget: float | None = None,
    sweep: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train one tuned arm with the task's first seed, without a verdict.

    Args:
        task_file: task.yaml.
        arm: a tuned arm, such as ``lora`` or ``full/head``.
        out: run directory; see `run_directory`.
        overrides: ``key=value`` with dotted keys.
        budget: minutes the training may take; by default the task's.
        sweep: try learning rates and ranks around the task's own on the validation part, and train
            with the best (`recipes.sweeping`); ``sweep.json`` in the run directory says which.
        progress: is told every step.

    Returns:
        the directory with adapter or model.

    Raises:
        ConfigError: the arm is not a tuned one, or does not fit the task.
        BudgetError: it would take longer than the budget.

    """
    from metier.model.device import set_up_processor
    from metier.recipes import experiment, sweeping
    from metier.task import Task

    set_up_processor(progress)
    overrides = [*overrides, f"arms={json.dumps([arm])}"]
    directory = run_directory(Task.load(task_file, overrides).name, out)
    make = sweeping.search if sweep else experiment.train_one
    return make(task_file, directory, overrides, budget, progress or Silent())


def overfit(
    task_file: Path,
    arm: str,
    rows: int = 8,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Overfit:
    """See whether a tuned arm can learn at all: train it on a few rows until it has them by heart.

    Args:
        task_file: task.yaml.
        arm: a tuned arm, such as ``lora`` or ``full/head``.
        rows: of the training part, the first that ask different things.
        overrides: ``key=value`` with dotted keys.
        progress: is told every step.

    Returns:
        whether it wrote every answer exactly, and if not, what may be wrong. Nothing is kept.

    Raises:
        ConfigError: the arm is not a tuned one, or does not fit the task.

    """
    from metier.model.device import set_up_processor
    from metier.recipes import overfitting

    set_up_processor(progress)
    overrides = [*overrides, f"arms={json.dumps([arm])}"]
    return overfitting.overfit(task_file, rows, overrides, progress or Silent())


def pretrain(
    config_file: Path,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Train a base on streamed text: a new one with its tokenizer, or a given one further.

    Returns:
        the directory of the base in Hugging Face layout; its training.json says how it went.

    """
    from metier.evaluation.statistics import ratio
    from metier.model.device import set_up_processor
    from metier.training.pretrain import pretrain as train_base
    from metier.training.pretrain_config import PretrainConfig

    set_up_processor(progress)
    config = PretrainConfig.load(config_file, overrides)
    out = run_directory(config.name, out)
    return train_base(config, config_file.parent, out, ratio, progress=progress)


def specialist(run: Path, arm: str | None = None) -> Specialist:
    """Load an arm of a finished run; by default the one its verdict names."""
    from metier.model.device import set_up_processor
    from metier.recipes.answering import load_specialist

    set_up_processor()
    return load_specialist(run, arm)


def predict(
    run: Path,
    file: Path,
    out: Path | None = None,
    arm: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a specialist's answers to every input of a file, as JSON lines.

    Each line names the row of the file and says whether its answer was finished. What is answered
    is kept in a file beside the target, from which the same call goes on after an interruption.

    Args:
        run: directory of a finished run.
        file: inputs, laid out as the task's data; outputs in it are ignored.
        out: file to write; by default the name of `file` with ``.answers.jsonl``.
        arm: by default the one the verdict names.
        progress: is told every input.

    """
    from metier.model.device import set_up_processor
    from metier.recipes.answering import predict as answer

    set_up_processor(progress)
    return answer(run, file, out, arm, progress or Silent())


def export(
    run: Path,
    arm: str | None = None,
    out: Path | None = None,
    merge: bool = False,
    prompts: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a tuned arm as a directory that others load without metier, once it is proven.

    The directory holds an adapter, or a whole model, with tokenizer, chat template, generation
    settings, a README and ``proof.json`` (see `metier.evaluation.proof`). It is asked the user's
    own prompts in every form, and what differs from the arm that was measured by more than
    rounding is not exported.

    Args:
        run: directory of a finished run.
        arm: ``lora`` or ``full``, by default the one the verdict names.
        out: directory to write, which must not exist; by default ``export/<arm>`` in the run, with
            ``-merged`` behind it where an adapter is merged.
        merge: merge the adapter into its base; an arm that is a whole model is one in any case.
        prompts: file of inputs, laid out as the task's data, all of which are asked; by default up
            to 64 inputs of the task's test part, whose answers are neither read nor graded.
        progress: is told every step.

    Returns:
        the directory.

    Raises:
        ExportError: the arm is not one model that writes, or what would be exported differs.
        RunError: the run is not finished, the directory exists, or its disk is too full.

    """
    from metier.model.device import set_up_processor
    from metier.recipes import exporting

    set_up_processor(progress)
    return exporting.export(run, arm, out, merge, prompts, progress or Silent())


def serve(
    run: Path,
    arm: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = (),
    announce: Callable[[str], None] = print,
) -> None:
    """Serve a specialist as an OpenAI-compatible API until interrupted.

    Args:
        run: directory of a finished run.
        arm: by default the one the verdict names.
        host: address to listen on.
        port: port; 0 for any free one.
        api_key: what clients must send; None asks for none.
        allowed_hosts: host names clients may address it by besides those of this machine.
        announce: is told the address once it listens.

    """
    from metier.serving import gateway

    loaded = specialist(run, arm)
    gateway.serve({loaded.name: loaded}, host, port, api_key, allowed_hosts, announce)
