"""The report: one self-contained HTML page, and a table for the terminal.

The page holds everything it shows: style and charts stand inside it, it has no script, and its
Content-Security-Policy forbids every request. All texts are escaped by Jinja or ElementTree.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.errors import RunError
from metier.evaluation import charts, curves, units
from metier.evaluation.confusion import Confusion, confusion_of
from metier.evaluation.schema import ArmDetails, ArmResult, Estimate, Forgotten, Verdict
from metier.runs import write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from rich.console import RenderableType
    from rich.text import Text

_PAGES = Path(__file__).parent / "pages"
_WRITERS = (
    units.percent,
    units.points,
    units.plain,
    units.decimal,
    units.count,
    units.tokens,
    units.seconds,
    units.size,
    units.money,
    units.probability,
)
_DECISIONS = {
    "ship": "SHIP",
    "use-simpler": "USE THE SIMPLER ARM",
    "none": "NOTHING CAN BE SHIPPED YET",
}
_FOLDED_FROM = 240
"""Characters from which a text of an example is folded."""
_LONGEST_TEXT = 4000
"""Characters of a text that the page holds; what is left out is said."""


def write_report(verdict: Verdict, details: Sequence[ArmDetails], path: Path) -> None:
    """Write the verdict as one HTML file, whole or not at all.

    Raises:
        RunError: the verdict or the details name an arm that has no result.

    """
    page = render_report(verdict, details)
    # Half a surrogate pair, which JSON data may hold, is shown as the replacement character.
    write_atomic(path, page.encode(errors="xmlcharrefreplace"))


def render_report(verdict: Verdict, details: Sequence[ArmDetails]) -> str:
    """The report as HTML text."""
    page = _environment().get_template("report.html.jinja")
    return page.render(_contents(verdict, details))


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in _WRITERS:
        environment.filters[write.__name__] = environment.globals[write.__name__] = write
    environment.filters["breakable"] = breakable
    return environment


def breakable(name: str) -> Markup:
    """A name that may break after `/` and `@` when it stands in a narrow place."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[/@])", name))


def _contents(verdict: Verdict, details: Sequence[ArmDetails]) -> dict[str, Any]:
    """Everything the template reads."""
    arms = sorted(verdict.arms, key=_by_score)
    by_name = _details_by_arm(verdict, details)
    style = (_PAGES / "report.css").read_text(encoding="utf-8")
    return {
        "verdict": verdict,
        "arms": arms,
        "tuned": [arm for arm in arms if arm.tuned],
        "reference": _arm(verdict, verdict.reference),
        "figures": key_figures(verdict),
        "difference_axis": charts.difference_axis(arms, verdict.margin),
        "metrics": list(dict.fromkeys(name for arm in arms for name in arm.metrics)),
        "tests": _tests(arms),
        "noted": [arm for arm in arms if arm.notes],
        "abilities": _abilities(arms),
        "trained": [(arm, by_name.get(arm.arm)) for arm in arms if arm.tuned],
        "confusions": _confusions(verdict, arms, by_name),
        "examples": _examples(verdict, arms, by_name),
        "break_even": _break_even,
        "excerpt": excerpt,
        "charts": charts,
        "curves": curves,
        "style": style,
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
    }


def _by_score(arm: ArmResult) -> tuple[float, str]:
    mean = arm.score.mean
    return (-mean if math.isfinite(mean) else math.inf, arm.arm)


def _arm(verdict: Verdict, name: str) -> ArmResult:
    for arm in verdict.arms:
        if arm.arm == name:
            return arm
    raise RunError(
        f"verdict of '{verdict.task}'",
        f"names the arm '{name}', which has no result",
        "run the evaluation again",
    )


def _details_by_arm(verdict: Verdict, details: Sequence[ArmDetails]) -> dict[str, ArmDetails]:
    for one in details:
        _arm(verdict, one.arm)
    return {one.arm: one for one in details}


def _tests(arms: Sequence[ArmResult]) -> dict[str, list[str]]:
    """Names of the arms under each statistical test."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        if arm.test:
            found.setdefault(arm.test, []).append(arm.arm)
    return found


def _abilities(arms: Sequence[ArmResult]) -> dict[str, list[tuple[ArmResult, Forgotten]]]:
    """What may have been forgotten, by ability: one chart each, one row per arm."""
    found: dict[str, list[tuple[ArmResult, Forgotten]]] = {}
    for arm in arms:
        for ability in arm.forgetting:
            found.setdefault(ability.name, []).append((arm, ability))
    return found


def _confusions(
    verdict: Verdict, arms: Sequence[ArmResult], details: Mapping[str, ArmDetails]
) -> list[tuple[ArmResult, Confusion]]:
    """Confusions of the arms that have labels, the arm to use first."""
    found = [(arm, confusion_of(details[arm.arm])) for arm in arms if arm.arm in details]
    drawn = [(arm, confusion) for arm, confusion in found if confusion is not None]
    return sorted(drawn, key=lambda pair: pair[0].arm != verdict.arm)


def _examples(
    verdict: Verdict, arms: Sequence[ArmResult], details: Mapping[str, ArmDetails]
) -> list[tuple[ArmResult, ArmDetails]]:
    """Examples of every arm but the reference; the tuned arm that the decision turns on first."""
    contender = _contender(verdict)
    shown = [
        (arm, details[arm.arm])
        for arm in arms
        if arm.arm in details and arm.arm != verdict.reference
    ]
    return sorted(shown, key=lambda pair: pair[0] is not contender)


@dataclass(frozen=True)
class Figure:
    """One number of the page's head."""

    value: str
    label: str
    note: str


def key_figures(verdict: Verdict) -> list[Figure]:
    """The arm to use, what it was measured against, and the bound that decided."""
    reference = _arm(verdict, verdict.reference)
    contender = _contender(verdict)
    figures = []
    if verdict.arm:
        figures.append(_score_figure(_arm(verdict, verdict.arm), "the arm to use"))
    if verdict.reference != verdict.arm:
        figures.append(_score_figure(reference, "the reference: best simpler arm"))
    if contender is None:
        return figures
    if verdict.contender != verdict.arm:
        figures.append(_score_figure(contender, "the tuned arm nearest to being shipped"))
    if contender.difference is not None:
        figures.append(
            Figure(
                units.points(contender.difference.mean),
                "points over the reference",
                f"95\u00a0% interval {interval(contender.difference, points=True)}",
            )
        )
    if contender.adjusted_low is not None:
        figures.append(
            Figure(
                units.points(contender.adjusted_low),
                "adjusted lower bound",
                f"must exceed the margin {units.points(verdict.margin)}",
            )
        )
    return figures


def _contender(verdict: Verdict) -> ArmResult | None:
    return _arm(verdict, verdict.contender) if verdict.contender else None


def _score_figure(arm: ArmResult, role: str) -> Figure:
    return Figure(
        units.percent(arm.score.mean), arm.arm, f"{role}; 95\u00a0% interval {interval(arm.score)}"
    )


def interval(estimate: Estimate, *, points: bool = False) -> str:
    """The ends of an interval: ``84.1 to 90.2`` (percent) or ``+3.9 to +8.3`` (points)."""
    write = units.points if points else lambda value: units.percent(value).removesuffix("\u00a0%")
    return f"{write(estimate.low)} to {write(estimate.high)}"


def _break_even(arm: ArmResult) -> str:
    """Requests until training has paid for itself, in words where there is no number."""
    if arm.break_even_requests is not None:
        return units.count(arm.break_even_requests)
    return "never" if arm.tuned else units.MISSING


@dataclass(frozen=True)
class Excerpt:
    """A text of an example as the page shows it."""

    text: str
    preview: str
    """First words of a text that is folded; empty for a short one."""
    left_out: int
    """Characters past the longest text a page holds."""


def excerpt(text: str) -> Excerpt:
    """Fold a long text and cut a very long one."""
    folded = len(text) > _FOLDED_FROM or text.count("\n") > 6
    first = " ".join(text[:_FOLDED_FROM].split())
    return Excerpt(
        text[:_LONGEST_TEXT], first[:120] if folded else "", max(len(text) - _LONGEST_TEXT, 0)
    )


def terminal_table(verdict: Verdict) -> RenderableType:
    """The decision and one line per arm, for a terminal of 80 columns or more."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(_DECISIONS[verdict.decision], style="bold"), _safe(verdict.headline)]
    lines += [_safe(f"Read with care: {note}") for note in verdict.notes]
    return Group(*lines, _table(verdict))


def _table(verdict: Verdict) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption="Scores in %, differences to the reference in points, p50 for one "
        f"request, cost of 1,000 requests in {verdict.currency}.",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("arm", overflow="fold", min_width=12)
    for name in ("score", "95 % interval", "diff.", "adj. low", "p50", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in sorted(verdict.arms, key=_by_score):
        style = "bold" if arm.arm == verdict.arm else ""
        table.add_row(*map(_safe, _cells(verdict, arm)), style=style)
    return table


def _cells(verdict: Verdict, arm: ArmResult) -> list[str]:
    difference = units.points(arm.difference.mean) if arm.difference else units.MISSING
    if arm.arm == verdict.reference:
        difference = "ref."
    return [
        "→" if arm.arm == verdict.arm else "",
        arm.arm,
        units.percent(arm.score.mean).removesuffix("\u00a0%"),
        interval(arm.score),
        difference,
        units.points(arm.adjusted_low),
        units.seconds(arm.latency_p50),
        units.money(arm.cost_per_1000, "").strip(),
    ]


def _safe(text: str) -> Text:
    """Text without control characters or rich markup: names come from the user's files."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\u00a0" else " " for c in text))
