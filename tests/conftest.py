"""What all tests share: the path of third_party/ and the real model and text, downloaded once."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "third_party"))

import fetch  # noqa: E402
import wiki_text  # noqa: E402


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, 98 MB."""
    try:
        return fetch.smollm2_gguf()
    except fetch.FetchError as error:
        pytest.skip(f"requires the model: {error}")


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    """Plain text of the last 5 MB of enwik8."""
    try:
        return wiki_text.enwik8_text("evaluation")
    except fetch.FetchError as error:
        pytest.skip(f"requires the text: {error}")
