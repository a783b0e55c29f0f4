"""The page and the terminal table: complete, well-formed, self-contained, inert."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import Environment
from rich.console import Console

from metier.errors import RunError
from metier.evaluation import report
from metier.evaluation.report import render_report, terminal_table, write_report
from metier.evaluation.schema import ArmDetails, ArmResult, Estimate, Verdict

from .html_tree import Node, read
from .sample_verdicts import (
    ALL,
    OVERRIDE,
    SCRIPT,
    arm,
    confusion,
    curve,
    hostile,
    samples,
    shipping,
    tuned,
)

SECTIONS = [
    "scores", "arms", "why", "forgetting", "training", "confusion", "examples", "data", "rule",
    "made",
]  # fmt: skip


@pytest.fixture(scope="module", params=ALL)
def case(request: pytest.FixtureRequest) -> tuple[Verdict, list[ArmDetails], str]:
    verdict, details = ALL[request.param]()
    return verdict, details, render_report(verdict, details)


def plainly(text: str) -> str:
    return " ".join(text.replace("\u2212", "-").split())


# The page as a document -------------------------------------------------------------------------


def test_the_page_is_well_formed(case):
    page = read(case[2])
    assert page.one("html")["lang"] == "en"
    assert len(list(page.all("h1"))) == 1
    ids = [node["id"] for node in page.all() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"] for link in page.all("a")}
    assert targets <= {f"#{name}" for name in ids}


def test_a_page_that_is_not_well_formed_is_noticed(case):
    with pytest.raises(AssertionError):
        read(case[2].replace("</section>", "", 1))


def test_the_page_asks_for_nothing_from_outside(case):
    page = read(case[2])
    for node in page.all():
        assert node.tag not in {
            "script",
            "link",
            "img",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
        }
        for name, value in node.attributes.items():
            assert name not in {"src", "srcset", "action", "style", "background"}
            assert not name.startswith("on")
            if name in {"href", "xlink:href"}:
                assert value.startswith("#")
    style = page.one("style").inside[0]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_page_own_style_only(case):
    page = read(case[2])
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m.attributes)
    style = page.one("style").inside[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_sections_come_in_the_order_a_reader_wants_them():
    page = read(render_report(*shipping()))
    assert [section["id"] for section in page.all("section")] == SECTIONS


def test_what_was_not_measured_has_no_section():
    page = read(render_report(*ALL["bare"]()))
    assert [section["id"] for section in page.all("section")] == [
        "scores", "arms", "why", "data", "rule", "made",
    ]  # fmt: skip
    assert len(list(page.all("figure"))) == 1


def test_pages_stay_small():
    assert len(render_report(*shipping()).encode()) < 2_000_000


def test_a_hundred_labels_and_eight_hopeless_arms_stay_below_two_megabytes():
    labels = tuple(f"a label of usual length {i}" for i in range(100))
    arms = tuple(tuned(f"lora@{i}", 0.3, 0.1, 0.05) for i in range(8))
    verdict = shipping()[0].model_copy(
        update={"arms": arms, "arm": "lora@0", "reference": "lora@1", "contender": "lora@0"}
    )
    details = [
        ArmDetails(
            arm=one.arm, labels=labels, confusion=confusion(labels, 20, 0.9, seed),
            won=samples("won"), lost=samples("lost"), curves=(curve(0, points=200),) * 3,
        )
        for seed, one in enumerate(arms)
    ]  # fmt: skip
    assert len(render_report(verdict, details).encode()) < 2_000_000


# Everything is in it ----------------------------------------------------------------------------


def numbers(value: Any, place: str = "") -> dict[str, float]:
    """Every number of a dumped verdict by its place in it."""
    if isinstance(value, dict):
        return {
            k: v for key, part in value.items() for k, v in numbers(part, f"{place}.{key}").items()
        }
    if isinstance(value, (list, tuple)):
        return {
            k: v for i, part in enumerate(value) for k, v in numbers(part, f"{place}.{i}").items()
        }
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {place: value}
    return {}


REFERENCE = arm(
    "classical", 0.0, score=Estimate(mean=0.611, low=0.572, high=0.653), validation_score=0.634,
    latency_p50=0.00217, latency_p95=0.00341, prompt_tokens=31.7, completion_tokens=4.3,
    training_seconds=5.27, peak_memory=2_190_000_000, cost_per_1000=0.0000731,
    metrics={"macro_f1": 0.5931},
)  # fmt: skip
TUNED = ArmResult.model_validate({
    "arm": "lora/head", "method": "lora", "mode": "head", "base": "starter", "tuned": True,
    "score": {"mean": 0.742, "low": 0.713, "high": 0.776}, "validation_score": 0.759,
    "metrics": {"macro_f1": 0.7283}, "p_value": 0.00046, "p_adjusted": 0.00092,
    "difference": {"mean": 0.131, "low": 0.083, "high": 0.184}, "adjusted_low": 0.067,
    "p_margin": 0.0038, "test": "sign-flip permutation",
    "seeds": [{"seed": 17, "test_score": 0.747, "validation_loss": 0.5192, "steps": 1367,
               "seconds": 262.0}],
    "latency_p50": 0.149, "latency_p95": 0.253, "latency_mean": 0.163,
    "latency_requests": 47, "prompt_tokens": 63.6, "completion_tokens": 7.9,
    "training_seconds": 259.0, "peak_memory": 2_190_000_000, "cost_per_1000": 0.00563,
    "break_even_requests": 41877.0,
    "forgetting": [
        {"name": "text: topics", "unit": "bits per byte", "lower_is_better": True,
         "before": {"mean": 1.8123, "low": 1.7914, "high": 1.8332},
         "after": {"mean": 1.8441, "low": 1.8219, "high": 1.8667},
         "loss": {"mean": 0.0176, "low": 0.0105, "high": 0.0248}, "tolerance": 0.0512,
         "holds": True},
        {"name": "skill: pairs", "unit": "accuracy", "lower_is_better": False,
         "before": {"mean": 0.7071, "low": 0.6882, "high": 0.7263},
         "after": {"mean": 0.6954, "low": 0.6758, "high": 0.7147},
         "loss": {"mean": 0.0117, "low": -0.0064, "high": 0.0291}, "tolerance": 0.0333,
         "holds": True},
    ],
})  # fmt: skip
COUNTED = Verdict.model_validate({
    "task": "t", "kind": "classification", "decision": "ship", "arm": "lora/head",
    "reference": "classical", "contender": "lora/head", "headline": "h", "rule": "r",
    "reasons": (), "margin": 0.022, "currency": "EUR", "seconds": 1873.0,
    "arms": (REFERENCE, TUNED),
    "data": {"train": 6043, "validation": 1087, "test": 1429, "test_clusters": 1291,
             "removed": {"too_long": 38}, "test_openings": 6, "test_rows_seen": 823},
})  # fmt: skip
WRITTEN = {
    ".version": "version 1",
    ".margin": "+2.2 points",
    ".seconds": "31 min 13 s",
    ".data.train": "6,043 examples",
    ".data.validation": "1,087 examples",
    ".data.test": "1,429 examples",
    ".data.test_clusters": "1,291 clusters",
    ".data.removed.too_long": "too_long 38",
    ".data.test_openings": "6 times",
    ".data.test_rows_seen": "823 of its examples",
    ".arms.0.score.mean": "61.1 %",
    ".arms.0.score.low": "57.2 % to",
    ".arms.0.score.high": "to 65.3 %",
    ".arms.0.metrics.macro_f1": "0.593",
    ".arms.0.validation_score": "63.4 %",
    ".arms.0.latency_p50": "2.17 ms",
    ".arms.0.latency_p95": "3.41 ms",
    ".arms.0.prompt_tokens": "31.7 +",
    ".arms.0.completion_tokens": "+ 4.3",
    ".arms.0.training_seconds": "5.27 s",
    ".arms.0.peak_memory": "at its peak: 2.19 GB",
    ".arms.0.cost_per_1000": "EUR 0.0000731",
    ".arms.1.score.mean": "74.2 %",
    ".arms.1.score.low": "71.3 % to",
    ".arms.1.score.high": "to 77.6 %",
    ".arms.1.metrics.macro_f1": "0.728",
    ".arms.1.validation_score": "75.9 %",
    ".arms.1.difference.mean": "+13.1",
    ".arms.1.difference.low": "+8.3 to",
    ".arms.1.difference.high": "to +18.4",
    ".arms.1.p_value": "0.00046",
    ".arms.1.p_adjusted": "0.00092",
    ".arms.1.p_margin": "0.0038",
    ".arms.1.adjusted_low": "bound +6.7",
    ".arms.1.seeds.0.seed": "17 74.7 %",
    ".arms.1.seeds.0.test_score": "74.7 %",
    ".arms.1.seeds.0.validation_loss": "0.519",
    ".arms.1.seeds.0.steps": "1,367",
    ".arms.1.seeds.0.seconds": "4 min 22 s",
    ".arms.1.latency_p50": "149 ms",
    ".arms.1.latency_p95": "253 ms",
    ".arms.1.latency_mean": "163 ms",
    ".arms.1.latency_requests": "253 ms of 47 requests",
    ".arms.1.prompt_tokens": "63.6 +",
    ".arms.1.completion_tokens": "+ 7.9",
    ".arms.1.training_seconds": "4 min 19 s",
    ".arms.1.peak_memory": "at its peak: 2.19 GB",
    ".arms.1.cost_per_1000": "EUR 0.00563",
    ".arms.1.break_even_requests": "41,877",
    ".arms.1.forgetting.0.before.mean": "before 1.812",
    ".arms.1.forgetting.0.before.low": "1.791 to",
    ".arms.1.forgetting.0.before.high": "to 1.833",
    ".arms.1.forgetting.0.after.mean": "after 1.844",
    ".arms.1.forgetting.0.after.low": "1.822 to",
    ".arms.1.forgetting.0.after.high": "to 1.867",
    ".arms.1.forgetting.0.loss.mean": "+1.8 %",
    ".arms.1.forgetting.0.loss.low": "+1.1 % to",
    ".arms.1.forgetting.0.loss.high": "to +2.5 %",
    ".arms.1.forgetting.0.tolerance": "tolerance +5.1 %",
    ".arms.1.forgetting.1.before.mean": "before 70.7 %",
    ".arms.1.forgetting.1.before.low": "68.8 % to",
    ".arms.1.forgetting.1.before.high": "to 72.6 %",
    ".arms.1.forgetting.1.after.mean": "after 69.5 %",
    ".arms.1.forgetting.1.after.low": "67.6 % to",
    ".arms.1.forgetting.1.after.high": "to 71.5 %",
    ".arms.1.forgetting.1.loss.mean": "+1.2",
    ".arms.1.forgetting.1.loss.low": "-0.6 to",
    ".arms.1.forgetting.1.loss.high": "to +2.9",
    ".arms.1.forgetting.1.tolerance": "tolerance +3.3",
}


def spoken(page: str) -> str:
    """The page's text as it reads, with space between cells."""
    return plainly(read(re.sub(r"(</(?:td|th|dt|dd|b|span|small|p|h\d)>)", r"\1 ", page)).text)


def test_every_number_of_a_verdict_stands_in_the_page():
    written = spoken(render_report(COUNTED, []))
    assert numbers(COUNTED.model_dump()).keys() == WRITTEN.keys()
    missing = {place: text for place, text in WRITTEN.items() if text not in written}
    assert missing == {}


def test_a_number_that_is_missing_from_the_page_is_noticed():
    other = COUNTED.model_copy(update={"margin": 0.047})
    assert WRITTEN[".margin"] not in spoken(render_report(other, []))


def test_memory_is_that_of_the_whole_process_once():
    written = spoken(render_report(*shipping()))
    assert written.count("2.41 GB") == 1
    assert "how much each of them needs cannot be told" in written
    assert "1.83 GB" not in written


def test_a_head_is_said_not_to_be_held_to_the_rule_on_forgetting():
    page = spoken(render_report(*shipping()))
    assert "not held to this, since it cannot write text" in page


def test_every_text_of_a_verdict_stands_in_the_page(case):
    verdict, _, page = case
    text = plainly(read(page).text)
    words = [verdict.headline, verdict.rule, verdict.command, verdict.made, verdict.task,
             *verdict.reasons, *verdict.what_would_change, *verdict.notes,
             *verdict.data.warnings, *verdict.data.removed, *verdict.versions,
             *verdict.versions.values()]  # fmt: skip
    for one in verdict.arms:
        words += [one.arm, one.base, one.test, *one.notes, *one.metrics]
        words += [part for row in one.forgetting for part in (row.name, row.unit)]
    assert [word for word in words if plainly(word) not in text] == []


def test_every_example_stands_in_the_page_with_its_answers_and_scores():
    verdict, details = shipping()
    page = read(render_report(verdict, details))
    articles: dict[str, Node] = {}
    for article in page.all("article"):
        articles.setdefault(plainly(article.one("h5").text), article)
    for one in (*samples("won"), *samples("lost", 6)):
        texts = [node.text for node in articles[one.id].all("div", "text")]
        wanted = [part or "(empty)" for part in (one.input, one.expected, one.answer,
                                                 one.reference_answer)]  # fmt: skip
        assert texts == wanted
        scores = [plainly(b.text) for b in articles[one.id].all("b")]
        assert scores == [f"{one.score * 100:.1f} %", f"{one.reference_score * 100:.1f} %"]


def test_the_decision_and_its_numbers_come_first():
    page = read(render_report(COUNTED, []))
    head = plainly(page.one("header").text)
    assert head.index("Ship the tuned arm") < head.index("74.2 %") < head.index("+13.1")
    assert "must exceed the margin +2.2" in head
    verdict, details = ALL["simpler"]()
    head = plainly(read(render_report(verdict, details)).one("header").text)
    assert "Use the simpler arm" in head
    assert "76.0 %" in head
    assert "-0.9" in head


def test_where_nothing_can_be_shipped_no_arm_is_named_as_the_one_to_use():
    verdict = ALL["simpler"]()[0].model_copy(update={"decision": "none", "arm": ""})
    html = render_report(verdict, [])
    page = read(html)
    head = plainly(page.one("header").text)
    assert "Nothing can be shipped yet" in head
    assert "the arm to use" not in head
    assert "the reference: best simpler arm" in head
    assert "the tuned arm nearest to being shipped" in head
    assert "use this" not in page.text
    assert "<title>tickets: nothing yet</title>" in html
    shown = lines(verdict)
    assert shown[0].strip() == "NOTHING CAN BE SHIPPED YET"
    assert not any("→" in line for line in shown)


def test_who_clears_the_margin_is_said_in_words():
    page = read(render_report(*ALL["simpler"]()))
    bounds = [plainly(node.text) for node in page.one("main").all("span", "bound")]
    assert bounds == ["bound -0.9, does not clear it", "bound -4.1, does not clear it"]


# Hostile and odd texts --------------------------------------------------------------------------


def test_scripts_in_any_text_stay_text():
    verdict, details = hostile()
    page = render_report(verdict, details)
    assert "<script" not in page
    assert "<img" not in page
    assert SCRIPT in read(page).text


def test_without_escaping_the_script_would_be_noticed(monkeypatch):
    safe = report._environment

    def careless() -> Environment:
        environment = safe()
        environment.autoescape = False
        return environment

    monkeypatch.setattr(report, "_environment", careless)
    assert "<script" in render_report(*hostile())


def test_directions_of_texts_are_kept_apart():
    page = read(render_report(*shipping()))
    holders = [node for node in page.all("div", "text") if OVERRIDE in node.text]
    assert holders
    assert all(node["dir"] == "auto" for node in holders)


def test_long_texts_are_folded_and_very_long_ones_cut_with_a_word():
    assert report.excerpt("short").preview == ""
    folded = report.excerpt("word " * 100)
    assert folded.text == "word " * 100
    assert len(folded.preview) == 120
    assert report.excerpt("a\n" * 9).preview
    cut = report.excerpt("x" * 5_000)
    assert (len(cut.text), cut.left_out) == (4_000, 1_000)
    verdict, details = shipping()
    long = details[4].won[0].model_copy(update={"input": "y" * 9_123})
    page = read(render_report(verdict, [details[4].model_copy(update={"won": (long,)})]))
    assert "5,123 more characters are left out here." in page.text


def test_an_arm_that_the_verdict_does_not_have_is_refused(tmp_path: Path):
    verdict, _ = shipping()
    path = tmp_path / "report.html"
    with pytest.raises(RunError, match="names the arm 'lora/tail'"):
        write_report(verdict, [ArmDetails(arm="lora/tail")], path)
    with pytest.raises(RunError, match="names the arm 'gone'"):
        write_report(verdict.model_copy(update={"reference": "gone"}), [], path)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_written_as_utf8_text(tmp_path: Path):
    path = tmp_path / "deep" / "report.html"
    write_report(*shipping(), path)
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "日本語" in page


@pytest.mark.parametrize("odd", ["half \ud83d a pair", "nul \x00 escape \x1b[31m bell \x07"])
def test_characters_that_no_text_should_hold_do_not_break_the_page(tmp_path: Path, odd: str):
    verdict, _ = ALL["bare"]()
    one = samples("won", 1)[0].model_copy(update={"input": odd})
    other = tuned("lora", 0.5, 0.0, 0.0)
    verdict = verdict.model_copy(update={"arms": (*verdict.arms, other)})
    write_report(verdict, [ArmDetails(arm="lora", won=(one,))], tmp_path / "report.html")
    assert read((tmp_path / "report.html").read_text(encoding="utf-8")).one("article")


# Colours ----------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_colours_stand_out_from_the_paper_in_light_dark_and_print():
    style = read(render_report(*ALL["bare"]())).one("style").inside[0]
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block))
               for block in re.findall(r":root \{(.*?)\}", style, re.S)]  # fmt: skip
    assert len(schemes) == 3
    for colours in schemes:
        for name in ("ink", "soft", "tuned", "simpler", "good", "bad"):
            pair = sorted((luminance(colours[name]), luminance(colours["paper"])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, name


# The terminal -----------------------------------------------------------------------------------


def lines(verdict: Verdict, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(verdict))
    return capture.get().splitlines()


@pytest.mark.parametrize("name", ALL)
def test_the_terminal_table_fits_80_columns_and_keeps_every_number(name):
    verdict, _ = ALL[name]()
    shown = lines(verdict)
    assert max(map(len, shown)) <= 80
    table = plainly(" ".join(shown))
    for one in verdict.arms:
        low, mean, high = (
            f"{v * 100:.1f}" for v in (one.score.low, one.score.mean, one.score.high)
        )
        assert f"{mean} {low} to {high}" in table
        if one.adjusted_low is not None:
            assert f"{one.adjusted_low * 100:+.1f}" in table
    assert "…" not in table
    letters = "".join(table.split())
    assert "".join(verdict.headline.split()) in letters


def test_the_terminal_shows_names_as_they_are():
    odd = arm("prompt@[red]x[/red]\x1b[31m", 0.5)
    verdict = ALL["bare"]()[0].model_copy(update={"arms": (odd,), "arm": odd.arm,
                                                  "reference": odd.arm})  # fmt: skip
    table = "\n".join(lines(verdict, 120))
    assert "[red]x[/red]" in table
    assert "\x1b" not in table
