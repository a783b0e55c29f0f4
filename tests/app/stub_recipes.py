"""Stands in for metier.recipes: records its calls, and fails as its first argument says."""

import time
from dataclasses import dataclass
from pathlib import Path

from metier.errors import DataError
from metier.evaluation.schema import DataSummary, Verdict
from metier.records import Completion

calls = []


@dataclass
class ArmPlan:
    arm: str
    minutes: float
    memory: int


@dataclass
class Plan:
    """As metier.recipes.planning has it, which would load torch."""

    arms: tuple[ArmPlan, ...]
    minutes: float
    memory: int


def _verdict():
    return Verdict(
        task="routing",
        kind="classification",
        decision="use-simpler",
        arm="classical",
        reference="classical",
        headline="Use classical.",
        rule="A rule.",
        reasons=("No tuned arm won.",),
        margin=0.02,
        currency="USD",
        data=DataSummary(train=8, validation=1, test=2, test_clusters=2),
        arms=(),
    )


def _act(word):
    match Path(word).stem:
        case "bad":
            raise DataError("rows.csv:3", "has a hole \x1b[31m", "fill it")
        case "crash":
            raise ZeroDivisionError("secret place")
        case "full":
            raise OSError(28, "No space left on device", "/some/file")
        case "interrupt":
            raise KeyboardInterrupt
        case "sleep":
            print("asleep", flush=True)
            time.sleep(30)


def demo(name="stdlib", out=None, overrides=(), budget=None, progress=None):
    calls.append(("demo", name, out, list(overrides), budget))
    progress.stage("train", 2)
    progress.advance(1, loss=0.5)
    return _verdict()


def run(task_file, out=None, overrides=(), budget=None, progress=None):
    calls.append(("run", task_file, out, list(overrides), budget))
    progress.stage("train", 2)
    _act(task_file)
    return _verdict()


def run_directory(task, out=None):
    return out or Path("runs") / task


def init(file, out=None, force=False):
    calls.append(("init", file, out, force))
    return out or Path("task.yaml")


def audit(task_file, overrides=()):
    _act(task_file)
    from metier.data.audit import Audit, Finding, Lengths

    lengths = Lengths(p50=3, p95=40, max=1200)
    none = Finding(rows=0)
    return Audit(
        rows=3,
        parts={"train": 2, "test": 1},
        input_characters=lengths,
        input_words=lengths,
        answer_characters=lengths,
        answer_words=lengths,
        labels={"ключ": 2, "[bold]": 1},
        identical=Finding(rows=2, examples=("a", "b")),
        conflicting=Finding(rows=9, examples=("a", "\x1b[31m")),
        near_duplicates=none,
        empty_answers=none,
        emails=none,
        phones=none,
        cards=none,
        removed={"duplicate-of-test": 1},
        warnings=("few rows",),
    )


def plan(task_file, overrides=(), progress=None):
    arms = (ArmPlan("prompt", 0.5, 10**9), ArmPlan("lora", 61.0, 0))
    return Plan(arms=arms, minutes=float("nan"), memory=10**9)


def train(task_file, arm, out=None, overrides=(), budget=None, sweep=False, progress=None):
    calls.append(("train", task_file, arm, out, list(overrides), budget, sweep))
    return (out or Path("runs")) / "x"


def pretrain(config_file, out=None, overrides=(), progress=None):
    return Path("runs/base")


def predict(run, file, out=None, arm=None, progress=None):
    calls.append(("predict", run, file, out, arm))
    return Path("answers.jsonl")


def export(run, arm=None, out=None, merge=False, prompts=None, progress=None):
    from tests.evaluation.sample_proof import proof

    calls.append(("export", run, arm, out, merge, prompts))
    out.mkdir()
    (out / "proof.json").write_text(proof().model_dump_json())
    return out


class Specialist:
    def stream(self, chat):
        text = chat[-1]["content"].upper()
        yield from text
        return Completion(text, 1, len(text), finished=text != "CUT")


def specialist(run, arm=None):
    calls.append(("specialist", run, arm))
    return Specialist()


def serve(run, arm=None, host="", port=0, api_key=None, allowed_hosts=(), ready=None):
    calls.append(("serve", run, arm, host, port, api_key, list(allowed_hosts)))
    if Path(run).stem == "real":
        from metier.serving import gateway

        gateway.serve({}, host, port, api_key, allowed_hosts, ready)
    else:
        ready(f"http://{host}:{port}/v1")
