"""Real tokenizers, with the control tokens and chat template a test asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metier.text.tokenizer import Tokenizer

MakeTokenizer = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def make_tokenizer(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeTokenizer:
    """Load gpt2, gpt_neox_20b or stories260k with extra control tokens and a chat template."""
    made: dict[str, Tokenizer] = {}

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
            source = data_dir / "tokenizers" / name
            if name == "stories260k":
                source = data_dir / "models" / "stories260k" / "hf"
            described = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
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
