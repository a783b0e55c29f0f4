"""Real tokenizers, with the control tokens and chat template a test asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metier.text.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Tokenizer]


def shorten(described: dict[str, Any], merges: int = 3000) -> None:
    """Keep the first merges, which GPT-2 numbers after its 256 bytes: quick to load."""
    model = described["model"]
    model["merges"] = model["merges"][:merges]
    model["vocab"] = {piece: i for piece, i in model["vocab"].items() if i < 256 + merges}
    described["added_tokens"][0]["id"] = 256 + merges


@pytest.fixture(scope="session")
def make_tokenizer(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Load gpt2, gpt_neox_20b, stories260k, or small (GPT-2's first merges), with more to it."""
    made: dict[str, Tokenizer] = {}
    sources = {name: data_dir / "tokenizers" / name for name in ("gpt2", "gpt_neox_20b")}
    sources["small"] = sources["gpt2"]
    sources["stories260k"] = data_dir / "models" / "stories260k" / "hf"

    def make(
        name: str,
        control: tuple[str, ...] = (),
        template: str | None = None,
        special: bool = True,
        rstrip: bool = False,
        **config: object,
    ) -> Tokenizer:
        key = repr((name, control, template, special, rstrip, config))
        if key not in made:
            described = json.loads((sources[name] / "tokenizer.json").read_text(encoding="utf-8"))
            if name == "small":
                shorten(described)
            first = max(
                [*described["model"]["vocab"].values()]
                + [token["id"] for token in described["added_tokens"]]
            )
            for place, content in enumerate(control, first + 1):
                described["added_tokens"].append(
                    {
                        "id": place,
                        "content": content,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": rstrip,
                        "normalized": False,
                        "special": special,
                    }
                )
            directory = tmp_path_factory.mktemp("tokenizer")
            (directory / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
            values = dict(config)
            if name == "stories260k":
                values = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **values}
            else:
                values.setdefault("eos_token", "<|endoftext|>")
            if template:
                values["chat_template"] = template
            (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
            made[key] = Tokenizer.load(directory)
        return made[key]

    return make
