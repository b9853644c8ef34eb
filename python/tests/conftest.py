"""What the tests share."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def bundled_trace() -> Path:
    """The small real trace of the repository: 8,192 tokens of one kv head."""
    data = Path(__file__).parents[2] / "tests" / "data"
    return data / "qwen2.5-coder-1.5b_persuasion-8k_L20H0.safetensors"
