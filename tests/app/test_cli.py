"""The command line over recipes that are stood in for; the real ones are tested with them."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import metier
from metier.app.cli import app

from . import stub_recipes as stub

HEAVY = {"torch", "transformers", "peft", "sklearn", "lancedb", "pyarrow", "openai", "fastapi"}
HERE = Path(__file__).parent
# SIGINT is set anew: a shell that starts the tests in the background has it ignored.
STUBBED = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    f"import sys; sys.path.insert(0, {str(HERE)!r}); import stub_recipes; "
    "sys.modules['metier.recipes'] = stub_recipes; from metier.app.cli import main; main()"
)


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.setitem(sys.modules, "metier.recipes", stub)
    monkeypatch.setattr(metier, "recipes", stub, raising=False)
    monkeypatch.delenv("METIER_API_KEY", raising=False)
    monkeypatch.delenv("METIER_DEBUG", raising=False)
    stub.calls.clear()

    def call(*arguments, **options):
        return CliRunner().invoke(app, list(map(str, arguments)), **options)

    return call


def metier_process(*arguments, stdout=subprocess.PIPE):
    """A real process over the stand-in recipes."""
    command = [sys.executable, "-c", STUBBED, *arguments]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


# --- start-up


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from metier.app.cli import app; app(['--help'], standalone_mode=False); "
        f"found = {HEAVY!r} & set(sys.modules); sys.exit(str(found) if found else 0)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what a person waits for on a machine that is not busy with other tests.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "Commands" in done.stdout
    assert min(seconds) < 0.5


def test_version(cli):
    assert cli("--version").stdout == "metier 0.1.0\n"


# --- what reaches the recipes


def test_run_hands_over_what_was_given_and_shows_the_verdict(cli):
    done = cli("run", "t.yaml", "--set", "a=1", "--set", "b.c=2", "--budget", "5", "--out", "o")
    assert done.exit_code == 0, done.output
    assert stub.calls == [("run", Path("t.yaml"), Path("o"), ["a=1", "b.c=2"], 5.0)]
    assert "Use classical." in done.stdout
    assert "report: o/report.html" in done.stderr
    assert "train" in done.stderr
    assert "train" not in done.stdout.replace("train lora", "")


def test_demo_names(cli):
    assert cli("demo", "extract").exit_code == 0
    assert cli("demo").exit_code == 0
    assert [call[1] for call in stub.calls] == ["extract", "stdlib"]
    wrong = cli("demo", "other")
    assert wrong.exit_code == 2
    assert "other" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "t.yaml"], {"task": "routing", "arm": "classical"}),
        (["demo"], {"task": "routing"}),
        (["init", "rows.csv", "--out", "t.yaml"], {"task": "t.yaml"}),
        (["audit", "t.yaml"], {"rows": 3, "labels": {"ключ": 2, "[bold]": 1}}),
        (["plan", "t.yaml"], {"minutes": None, "memory": 10**9}),
        (["train", "t.yaml", "lora"], {"path": "runs/x"}),
        (["pretrain", "p.yaml"], {"path": "runs/base"}),
        (["predict", "runs/x", "rows.csv", "--arm", "lora"], {"path": "answers.jsonl"}),
        (["serve", "runs/x", "--no-key"], {"url": "http://127.0.0.1:8000/v1"}),
    ],
)
def test_json_is_all_there_is_on_the_standard_output(cli, arguments, expected):
    done = cli(*arguments, "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert {key: printed[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["init", "rows.csv"], "task: task.yaml\n"),
        (["train", "t.yaml", "lora"], "path: runs/x\n"),
    ],
)
def test_without_json_people_read_an_outline(cli, arguments, text):
    assert cli(*arguments).stdout == text


def test_a_plan_is_a_table(cli):
    lines = [line.split("  ") for line in cli("plan", "t.yaml").stdout.splitlines() if line.strip()]
    cells = [[cell.strip().replace("\xa0", " ") for cell in line if cell.strip()] for line in lines]
    assert ["prompt", "30 s", "1 GB"] in cells
    assert ["lora", "1 h 1 min", "–"] in cells
    assert ["all", "–", "1 GB"] in cells


def test_an_audit_names_what_to_look_at(cli):
    shown = cli("audit", "t.yaml").stdout
    assert "3 (train 2, test 1)" in shown
    assert "3, 95 % up to 40, longest 1,200" in shown
    assert "2, from ключ (2) to [bold] (1)" in shown
    assert "2 rows (a, b)" in shown
    assert "9 rows (a, \N{REPLACEMENT CHARACTER}[31m, ...)" in shown
    assert "duplicate-of-test 1" in shown
    assert "warning: few rows" in shown


def test_an_export_shows_what_was_proven(cli, tmp_path):
    out = tmp_path / "mine"
    done = cli("export", "runs/x", "--arm", "lora", "--merge", "--prompts", "p.csv", "--out", out)
    assert done.exit_code == 0, done.output
    assert stub.calls == [("export", Path("runs/x"), "lora", out, True, Path("p.csv"))]
    shown = " ".join(done.stdout.split())
    assert "merged in memory 2 1 0.13" in shown
    assert "served over HTTP 3 0 –" in shown
    assert "Asked: 3 prompts of p.csv (1 more are empty or too long)." in shown
    assert "Rounding explains a difference of logits of 0.5 at most." in shown
    assert f"Exported to {out}" in shown.replace("mine ", "mine")


def test_an_export_is_json_too(cli, tmp_path):
    done = cli("export", "runs/x", "--out", tmp_path / "mine", "--json")
    printed = json.loads(done.stdout)
    assert printed["path"] == str(tmp_path / "mine")
    assert printed["proof"]["forms"][0]["ties"] == [{"prompt": "row 2", "token": 4, "gap": 0.1}]


SWEEP = {
    "arm": "lora",
    "seed": 0,
    "directory": "x",
    "trials": [
        {
            "learning_rate": 0.0063,
            "rank": 8,
            "overrides": ["training.learning_rate=0.0063", "training.lora.rank=8"],
            "rungs": [{"rung": 2, "steps": 1200, "validation_loss": 1.5, "seconds": 61.0}],
        },
        {
            "learning_rate": 0.0021,
            "rank": 16,
            "overrides": [],
            "rungs": [{"rung": 1, "failed": "step 3: no number"}],
        },
    ],
}


def test_a_sweep_shows_what_it_tried(cli, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP))
    done = cli("train", "t.yaml", "lora", "--sweep", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert stub.calls[-1][-1] is True
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["→", "0.0063", "8", "2", "1,200", "–", "1.500", "1", "min", "1", "s"] in lines
    assert ["0.0021", "16", "1", "0", "–", "–", "0", "s"] in lines
    assert "learning rate 0.0021: step 3: no number" in done.stdout
    settings = "--set training.learning_rate=0.0063 --set training.lora.rank=8"
    assert settings in " ".join(done.stdout.split())
    printed = json.loads(
        cli("train", "t.yaml", "lora", "--sweep", "--out", tmp_path, "--json").stdout
    )
    assert printed["path"] == str(tmp_path / "x")
    assert [trial["rungs"][0]["rung"] for trial in printed["sweep"]["trials"]] == [2, 1]
    missing = cli("train", "t.yaml", "lora", "--sweep", "--out", tmp_path / "none")
    assert missing.exit_code == 2
    assert "sweep.json: cannot be read" in missing.stderr


# --- what goes wrong


def test_an_error_names_place_cause_and_remedy(cli):
    done = cli("run", "bad.yaml")
    assert done.exit_code == 2
    assert "error: rows.csv:3: has a hole" in done.stderr
    assert "remedy: fill it" in done.stderr
    assert "Traceback" not in done.output
    assert "\x1b" not in done.stderr, "data must not steer the terminal"
    assert done.stdout == ""


def test_an_error_is_json_too(cli):
    done = cli("audit", "bad.yaml", "--json")
    assert done.exit_code == 2
    error = {"place": "rows.csv:3", "cause": "has a hole \x1b[31m", "remedy": "fill it"}
    assert json.loads(done.stdout) == {"error": error}


def test_a_full_disk_is_something_to_mend(cli):
    done = cli("run", "full.yaml")
    assert done.exit_code == 2
    assert "/some/file: No space left on device" in done.stderr


def test_a_fault_of_our_own_is_short_and_says_how_to_see_more(cli, monkeypatch):
    done = cli("run", "crash.yaml")
    assert done.exit_code == 1
    assert "ZeroDivisionError: secret place" in done.stderr
    assert "METIER_DEBUG=1" in done.stderr
    assert "Traceback" not in done.stderr
    monkeypatch.setenv("METIER_DEBUG", "1")
    assert "Traceback" in cli("run", "crash.yaml").stderr


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "a", "b"], ["nothing"], ["run", "t", "--budget", "x"]]
)
def test_wrong_usage(cli, arguments):
    done = cli(*arguments)
    assert done.exit_code == 2
    assert "Usage" in done.stderr


def test_interrupted_says_how_to_go_on(cli):
    done = cli("run", "interrupt.yaml")
    assert done.exit_code == 130
    assert "the same command goes on from there" in done.stderr
    assert "goes on" not in cli("audit", "interrupt.yaml").stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_real_process(number, code):
    with metier_process("run", "sleep.yaml") as process:
        assert process.stdout.readline() == "asleep\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    with metier_process("plan", "t.yaml", stdout=write) as process:
        os.close(write)
        _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    assert "fault" not in errors


# --- serve and chat


def test_serve_makes_a_key_and_shows_it_once(cli):
    done = cli("serve", "runs/x", "--port", "9", "--allow-host", "box", "--json")
    shown = json.loads(done.stdout)
    name, run, arm, host, port, key, hosts = stub.calls[0]
    assert (name, run, arm, host, port, hosts) == (
        "serve",
        Path("runs/x"),
        None,
        "127.0.0.1",
        9,
        ["box"],
    )
    assert shown["api_key"] == key
    assert len(key) >= 43
    cli("serve", "runs/x")
    assert stub.calls[1][5] != key


def test_serve_takes_a_key_from_the_environment_and_keeps_it_to_itself(cli, monkeypatch):
    monkeypatch.setenv("METIER_API_KEY", "given-key")
    done = cli("serve", "runs/x")
    assert stub.calls[0][5] == "given-key"
    assert "given-key" not in done.output
    cli("serve", "runs/x", "--no-key")
    assert stub.calls[1][5] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_well_when_it_is_told_to(number):
    with metier_process("serve", "real", "--port", "0", "--json") as process:
        shown = json.loads(process.stdout.readline())
        headers = {"Authorization": f"Bearer {shown['api_key']}"}
        assert httpx.get(f"{shown['url']}/models").status_code == 401
        assert httpx.get(f"{shown['url']}/models", headers=headers).json()["data"] == []
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == ""


def test_chat_answers_every_line(cli):
    done = cli("chat", "runs/x", "--arm", "lora", input="one\n\n two \ncut\n")
    assert stub.calls == [("specialist", Path("runs/x"), "lora")]
    assert done.stdout == "ONE\nTWO\nCUT ... (cut at the length limit)\n"


def test_chat_answers_in_json_lines(cli):
    lines = cli("chat", "runs/x", "--json", input="one\ncut\n").stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["text"] for answer in answers] == ["ONE", "CUT"]
    assert [answer["finished"] for answer in answers] == [True, False]
