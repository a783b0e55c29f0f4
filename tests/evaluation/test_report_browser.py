"""The page in a real browser: it fits, asks for nothing, runs nothing, draws to scale."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jinja2 import Environment

from metier.evaluation import report
from metier.evaluation.report import render_report, write_report

from .chromium import FOUND, Chromium
from .sample_verdicts import ALL, hostile, shipping

pytestmark = pytest.mark.skipif(
    not FOUND, reason="no chromium on this machine: install it to see the report in a browser"
)
MARKS = """
[...document.querySelectorAll('#scores figure:first-of-type svg.row')].map(row => {
  const box = row.getBoundingClientRect(), dot = row.querySelector('circle');
  const mark = dot.getBoundingClientRect();
  return [(mark.left + mark.width / 2 - box.left) / box.width,
          (mark.top + mark.height / 2 - box.top) / box.height];
})
"""
SPILLING = """
[...document.querySelectorAll('body *')].filter(node => {
  const box = node.getBoundingClientRect(), page = document.documentElement.clientWidth;
  return !node.closest('.scroll') && !node.closest('svg') && box.width &&
    (box.right > page + 1 || box.left < -1);
}).map(node => node.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


def complaints(browser: Chromium) -> list[str]:
    """What the browser logged: refused styles, scripts and requests, and other errors."""
    logged = [e["params"] for e in browser.events if e["method"] == "Log.entryAdded"]
    return [str(entry["entry"]["text"]) for entry in logged]


def requests(browser: Chromium) -> list[str]:
    sent = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return [str(one["request"]["url"]) for one in sent]


@pytest.mark.parametrize("name", ALL)
def test_the_page_fits_a_phone_and_a_desktop_and_asks_for_nothing(browser, tmp_path, name):
    page = tmp_path / "report.html"
    write_report(*ALL[name](), page)
    for width, dark in ((360, False), (1280, True)):
        browser.open(page, width, dark=dark)
        browser.ask("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert browser.ask("document.documentElement.scrollWidth") <= width
        assert browser.ask(SPILLING) == []
        assert browser.ask("typeof window.hacked") == "undefined"
        assert requests(browser) == [page.resolve().as_uri()]
        assert complaints(browser) == []
        paper = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(21, 23, 26)" if dark else "rgb(253, 253, 251)")


@pytest.mark.parametrize("width", [360, 1280])
def test_marks_are_drawn_to_scale(browser, tmp_path, width):
    verdict, details = shipping()
    page = tmp_path / "report.html"
    write_report(verdict, details, page)
    browser.open(page, width)
    scores = sorted((one.score.mean for one in verdict.arms), reverse=True)
    drawn = browser.ask(MARKS)
    assert [x for x, _ in drawn] == pytest.approx(scores, abs=0.003)
    assert [y for _, y in drawn] == pytest.approx([0.5] * len(scores), abs=0.02)


def test_the_policy_stops_a_script_even_if_escaping_failed(browser, tmp_path, monkeypatch):
    """Control: the same page without its policy is taken over, so the tests above can fail."""
    safe = report._environment

    def careless() -> Environment:
        environment = safe()
        environment.autoescape = False
        return environment

    monkeypatch.setattr(report, "_environment", careless)
    guarded, bare = tmp_path / "guarded.html", tmp_path / "bare.html"
    page = render_report(*hostile())
    guarded.write_text(page, encoding="utf-8")
    bare.write_text(page.replace("Content-Security-Policy", "X-Nothing"), encoding="utf-8")
    browser.open(guarded, 800)
    assert browser.ask("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in text for text in complaints(browser))
    browser.open(bare, 800)
    assert browser.ask("window.hacked") is True


def test_a_page_that_is_too_wide_is_noticed(browser, tmp_path):
    page = tmp_path / "wide.html"
    viewport = "<meta name=viewport content='width=device-width'>"
    page.write_text(
        f"<!doctype html>{viewport}<div style='width: 900px'>wide</div>", encoding="utf-8"
    )
    browser.open(page, 360)
    assert browser.ask("document.documentElement.scrollWidth") > 360
    assert browser.ask(SPILLING) != []
