"""The real small model, loaded once, and copies of its directory to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from metier.model.load import Base, load_base
from metier.text.template import Renderer


@pytest.fixture(scope="session")
def base(stories260k: Path) -> Base:
    return load_base(str(stories260k), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def renderer(base: Base) -> Renderer:
    return Renderer(base.tokenizer, "plain")


@pytest.fixture
def copy(stories260k: Path, tmp_path: Path) -> Path:
    """A copy of the model's directory, to be changed."""
    directory = tmp_path / "model"
    shutil.copytree(stories260k, directory, copy_function=shutil.copyfile)
    return directory
