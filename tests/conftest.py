"""What tests share: the path of third_party/, the real model and text, small checkpoints, this machine's figures."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is loaded: threads that wait spinning would take the processor from what runs beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import dcext
from dcext import _C
from dcext.policy.machine import Machine
from dcext.profiling import measure

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
def smollm2(smollm2_gguf: Path) -> Path:
    """The same in float32, as a folder with its tokenizer, made once: reading GGUF takes half a minute of Python."""
    pytest.importorskip("transformers")
    from dcext.hub import load_float_model

    folder = ROOT / "build" / "smollm2"
    with fetch.locked(folder.with_name("smollm2.lock")):
        if not folder.exists():
            model, tokenizer = load_float_model(smollm2_gguf)
            model.hf_quantizer.remove_quantization_config(model)  # of GGUF: what it loaded is float
            partial = folder.with_name("smollm2.partial")
            for part in (model, tokenizer):
                part.save_pretrained(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    """Plain text of the last 5 MB of enwik8."""
    try:
        return wiki_text.enwik8_text("evaluation")
    except fetch.FetchError as error:
        pytest.skip(f"requires the text: {error}")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one small model, by codec."""
    pytest.importorskip("transformers")
    from models import grouped_llama

    parent = tmp_path_factory.mktemp("models")
    for codec in ("zstd", "packed"):
        config = dcext.CompressionConfig(recipe="int8", codec=codec)
        made = dcext.compress_(grouped_llama(256, 1024, vocabulary=4096), config)
        dcext.save_pretrained(made, parent / codec)
    return {codec: parent / codec for codec in ("zstd", "packed")}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """This one, measured in a hurry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCEXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(measure, "SECONDS_OF_A_FIGURE", 1e-3)
        patch.setattr(measure, "DISK_NBYTES", 32 << 20)
        machine = measure.tune()
        assert measure.tune().to_dict() == machine.to_dict()  # from the cache
        assert measure.tune(refresh=True).identity == machine.identity
    return machine
