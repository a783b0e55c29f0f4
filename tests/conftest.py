"""What every test shares: no network, one thread, and the way to the real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Set before anything imports torch or a Hugging Face library: they read these once.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)

# A busy machine is no fault of the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parent.parent


def _absent(reason: str) -> None:
    """Skip on a developer's machine, fail where the data must be there."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: METIER_TEST_DATA, else ../shared/data beside the repository."""
    path = Path(os.environ.get("METIER_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        _absent(f"no real data at {path}: set METIER_TEST_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """A real model of 260,032 parameters in Hugging Face layout."""
    path = data_dir / "models" / "stories260k" / "hf"
    if not path.is_dir():
        _absent(f"no model at {path}: METIER_TEST_DATA lacks models/stories260k/hf")
    return path
