"""Progress where there is no terminal, and what text may reach one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.app import terminal


def test_a_log_names_stages_progress_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_LOG_SECONDS", -1.0)
    with terminal.TerminalProgress() as progress:
        progress.advance(1)
        progress.stage("train [lora], seed 1", 3)
        progress.advance(1, loss=1.23456, note="[red]")
        progress.advance(1)
        progress.say("held-out [x]")
        progress.stage("score")
        progress.advance(2)
    out, errors = capsys.readouterr()
    assert out == ""
    lines = errors.splitlines()
    assert lines[0] == "train [lora], seed 1 ..."
    assert lines[1] == "  1/3  loss 1.235  note [red]"
    assert lines[2].startswith("  2/3, ")
    assert lines[2].endswith("s left")
    assert lines[3] == "held-out [x]"
    assert lines[4].startswith("train [lora], seed 1: ")
    assert lines[5:7] == ["score ...", "  2"]


def test_an_interrupted_stage_is_not_called_done(capsys):
    def work():
        with terminal.TerminalProgress() as progress:
            progress.stage("train", 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err == "train ...\n"


@given(st.text())
def test_no_text_steers_the_terminal(text):
    shown = terminal.printable(text)
    changed = [new for old, new in zip(text, shown, strict=True) if new != old]
    assert set(changed) <= {"\N{REPLACEMENT CHARACTER}"}
    assert "".join(c for c in shown if c not in "\n\t\N{NO-BREAK SPACE}").isprintable()


def test_escape_sequences_are_made_visible_and_spaces_stay():
    given = "a\x1b[2Jb\rc\td\n\N{NO-BREAK SPACE}é"
    assert terminal.printable(given) == "a\ufffd[2Jb\ufffdc\td\n\N{NO-BREAK SPACE}é"
