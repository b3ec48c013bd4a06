"""What all tests share: the path of third_party/ and the real model and text, downloaded once."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is loaded: threads that wait spinning would take the processor from what runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dcext import _C

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "third_party"))

import fetch  # noqa: E402
import wiki_text  # noqa: E402


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine, selected."""
    before = _C.selected_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(scope="session")
def nvcc() -> str:
    """CUDA's compiler; it needs no GPU."""
    found = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "/nowhere") + "/bin")
    found = found or shutil.which("nvcc")
    if found is None:
        pytest.skip("requires nvcc")
    return found


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
