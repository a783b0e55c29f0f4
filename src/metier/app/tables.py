"""An audit and a plan as tables for the terminal; the verdict's table is the report's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metier.app.terminal import printable
from metier.evaluation import card, units

if TYPE_CHECKING:
    from metier.data.audit import Audit, Finding, Lengths
    from metier.evaluation.proof import Proof
    from metier.recipes.overfitting import Overfit
    from metier.recipes.planning import Plan
    from metier.recipes.sweeping import Sweep


def plan_table(plan: Plan) -> RenderableType:
    """Time and memory of each arm, and of the whole run."""
    table = Table("arm", box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.columns[0].footer = "all"
    table.add_column("time", units.seconds(plan.minutes * 60), justify="right")
    table.add_column("memory", units.size(plan.memory), justify="right")
    for arm in plan.arms:
        table.add_row(_cell(arm.arm), units.seconds(arm.minutes * 60), units.size(arm.memory))
    return table


def export_table(exported: Mapping[str, Any]) -> RenderableType:
    """What an export was held to, and where it lies."""
    proof: Proof = exported["proof"]
    first, *others = card.COLUMNS
    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    for row in card.results(proof):
        table.add_row(*row)
    words = (card.asked(proof), card.explained(proof), f"Exported to {exported['path']}")
    return Group(table, *map(_cell, words))


def overfit_table(found: Overfit) -> RenderableType:
    """Whether an arm can learn, and what may be wrong where it cannot."""
    steps = f"{found.steps:,} steps at learning rate {found.learning_rate:.3g}"
    fell = f"loss {units.decimal(found.first_loss)} to {units.decimal(found.last_loss)}"
    lines = [
        f"{'passed' if found.passed else 'FAILED'}: {found.arm} wrote {found.written} of "
        f"{found.rows} answers exactly after {steps}, {fell}"
    ]
    for one in found.missed:
        end = "" if one.finished else " ... (it did not end)"
        lines.append(f"  {one.row}: taught {one.taught!r}, written {one.written!r}{end}")
    lines += [f"  may be wrong: {cause}" for cause in found.causes]
    return Group(*map(_cell, lines))


def sweep_table(swept: Mapping[str, Any]) -> RenderableType:
    """How far each setting came, the winner first, and how to use it."""
    sweep: Sweep = swept["sweep"]
    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    ranked = any(trial.rank for trial in sweep.trials)
    names = ("learning rate", *["rank"] * ranked, "rung", "steps", "mistakes", "loss", "time")
    for name in names:
        table.add_column(name, justify="right")
    for place, trial in enumerate(sweep.trials):
        last = trial.rungs[-1]
        table.add_row(
            "→" if place == 0 else "",
            f"{trial.learning_rate:g}",
            *[str(trial.rank)] * ranked,
            str(last.rung),
            f"{last.steps:,}",
            units.percent(last.validation_mistakes),
            units.decimal(last.validation_loss),
            units.seconds(last.seconds),
        )
    told = [
        f"learning rate {trial.learning_rate:g}: {trial.rungs[-1].failed}"
        for trial in sweep.trials
        if trial.rungs[-1].failed
    ]
    settings = " ".join(f"--set {change}" for change in sweep.trials[0].overrides)
    use = f"To use it elsewhere: {settings}" if settings else "The task's own setting is the best."
    words = ("Mistakes and loss are of the validation part.", *told, use, f"Made: {swept['path']}")
    return Group(table, *map(_cell, words))


def audit_table(audit: Audit) -> RenderableType:
    """What is in the data, and which rows to look at."""
    rows = {
        "rows": f"{audit.rows:,} ({_counts(audit.parts)})",
        "characters of an input": _lengths(audit.input_characters),
        "words of an input": _lengths(audit.input_words),
        "characters of an answer": _lengths(audit.answer_characters),
        "words of an answer": _lengths(audit.answer_words),
    }
    if audit.labels:
        first, *_, last = [f"{name} ({count:,})" for name, count in audit.labels.items()] * 2
        rows["labels"] = f"{len(audit.labels):,}, from {first} to {last}"
    rows |= {
        "identical rows": _finding(audit.identical),
        "same input, other answer": _finding(audit.conflicting),
        "near-duplicates in a part": _finding(audit.near_duplicates),
        "answers that say nothing": _finding(audit.empty_answers),
        "e-mail addresses": _finding(audit.emails),
        "telephone numbers": _finding(audit.phones),
        "payment cards": _finding(audit.cards),
        "left out by the split": _counts(audit.removed) or "none",
    }
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, _cell(value))
    return Group(table, *(_cell(f"warning: {text}") for text in audit.warnings))


def _finding(finding: Finding) -> str:
    if not finding.rows:
        return "none"
    more = ", ..." if finding.rows > len(finding.examples) else ""
    return f"{finding.rows:,} rows ({', '.join(finding.examples)}{more})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _lengths(lengths: Lengths) -> str:
    return f"{lengths.p50:,}, 95 % up to {lengths.p95:,}, longest {lengths.max:,}"


def _cell(text: str) -> Text:
    """Text as it is: ids and labels come from the user's files and may look like markup."""
    return Text(printable(text))
