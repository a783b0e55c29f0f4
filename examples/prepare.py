"""Turn published data sets whose layout metier does not read into JSONL that it does.

    python examples/prepare.py NAME SOURCE OUT
    metier init OUT/train.jsonl            # snips
    metier init OUT/NAME.jsonl             # bfcl, lamini_docs

NAME is one of

- snips: SOURCE is the folder of the voice-assistant benchmark of 2017 with its files
  train_INTENT.json and validate_INTENT.json. Utterance to JSON with intent and slots.
- bfcl: SOURCE is a folder of the Berkeley function-calling leaderboard with BFCL_*.jsonl and
  possible_answer/. Request and function schemas to one call as JSON; where several values are
  accepted, the first counts, and optional arguments that may be left out are.
- lamini_docs: SOURCE is lamini_docs.jsonl or .jsonl.gz. Questions lose their
  '### Question: ... ### Answer:' frame; rows without a question or an answer are left out and
  counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metier.data.files import read_rows
from metier.errors import DataError, MetierError
from metier.runs import write_atomic

Rows = list[dict[str, Any]]


def main() -> None:
    """Read the command line, convert, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(CONVERTERS))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        for file, rows in CONVERTERS[arguments.name](arguments.source).items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(arguments.out / file, text)
            print(f"{arguments.out / file}: {len(rows):,} rows")
    except MetierError as error:
        parser.exit(2, f"{error}\n")


def snips(source: Path) -> dict[str, Rows]:
    """Utterances with their intent and slots; the validation files become the test part."""
    return {
        "train.jsonl": _utterances(source, "train"),
        "test.jsonl": _utterances(source, "validate"),
    }


def _utterances(source: Path, part: str) -> Rows:
    rows = []
    for path in _files(source, f"{part}_*.json"):
        for intent, utterances in json.loads(path.read_text(encoding="utf-8")).items():
            rows += [_utterance(intent, utterance["data"]) for utterance in utterances]
    return rows


def _utterance(intent: str, spans: list[dict[str, str]]) -> dict[str, Any]:
    slots: dict[str, Any] = {}
    for span in spans:
        name = span.get("entity")
        if name in slots:
            before = slots[name] if isinstance(slots[name], list) else [slots[name]]
            slots[name] = [*before, span["text"].strip()]
        elif name:
            slots[name] = span["text"].strip()
    text = "".join(span["text"] for span in spans).strip()
    return {"input": text, "output": {"intent": intent, "slots": slots}}


def bfcl(source: Path) -> dict[str, Rows]:
    """Requests with function schemas, and the call that answers them."""
    return {"bfcl.jsonl": [row for path in _files(source, "BFCL_*.jsonl") for row in _calls(path)]}


def _calls(path: Path) -> Iterator[dict[str, Any]]:
    truths = {
        row.values["id"]: row.values["ground_truth"]
        for row in read_rows(path.parent / "possible_answer" / path.name)
    }
    for row in read_rows(path):
        ((name, accepted),) = truths[row.values["id"]][0].items()
        schemas = json.dumps(row.values["function"], ensure_ascii=False, separators=(",", ":"))
        request = "\n".join(message["content"] for message in row.values["question"][0])
        yield {
            "id": row.values["id"],
            "group": name,
            "input": f"Functions: {schemas}\nRequest: {request}",
            "output": {"name": name, "arguments": _chosen(accepted)},
        }


def _chosen(accepted: dict[str, list[Any]]) -> dict[str, Any]:
    """The first accepted value of each argument; one that may be left out ('') is."""
    first = {key: values[0] for key, values in accepted.items() if values and "" not in values}
    return {key: _plain(value) for key, value in first.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return _chosen(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


def lamini_docs(source: Path) -> dict[str, Rows]:
    """Questions and answers without the frame around the question."""
    rows = [
        {"question": _unframed(row.values["question"]), "answer": row.values["answer"].strip()}
        for row in read_rows(source)
    ]
    whole = [row for row in rows if row["question"] and row["answer"]]
    print(f"{len(rows) - len(whole)} rows without a question or an answer left out")
    return {"lamini_docs.jsonl": whole}


def _unframed(question: str) -> str:
    text = question.strip().removesuffix("### Answer:")
    return text.strip().removeprefix("### Question:").strip()


def _files(source: Path, pattern: str) -> list[Path]:
    found = sorted(source.glob(pattern))
    if not found:
        raise DataError(str(source), f"holds no files {pattern}", "name the folder of the data set")
    return found


CONVERTERS = {"snips": snips, "bfcl": bfcl, "lamini_docs": lamini_docs}

if __name__ == "__main__":
    main()
