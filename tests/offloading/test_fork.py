"""Forked processes: what the library starts there works as in a fresh process, what is the parent's is refused, nothing hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

import dcext
from forked import run_code

TIMEOUT_S = 120
# The parent has used everything that has threads: reads, the codec's pool, and torch's OpenMP, which is the one that does
# not survive (libgomp waits for ever for the parent's threads), so that children compute with one thread, as those of
# torch's DataLoader do.
PRELUDE = """
import gc, os, signal, sys, threading, torch, dcext
folder, least = sys.argv[1], int(sys.argv[2])
dcext.set_num_threads(2)
torch.set_num_threads(2)

def load():
    return dcext.from_pretrained(folder, host_memory=least)

def logits(model):
    with torch.inference_mode():
        return model(torch.arange(5)[None]).logits

def forked(work):
    child = os.fork()
    if child != 0:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    signal.alarm(100)  # a child that hangs must not outlive the test
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(1)

model = load()
assert set(model.dcext_offload.tiers.values()) == {"disk"}
expected = logits(model)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from models import grouped_llama

    config = dcext.CompressionConfig(recipe="int8", codec="zstd")
    made = dcext.compress_(grouped_llama(512, 1024, vocabulary=8192), config)
    path = tmp_path_factory.mktemp("fork") / "model"
    dcext.save_pretrained(made, path)
    return path


def run(folder: Path, code: str) -> None:
    """In a process of its own, which nothing that hangs outlives."""
    from dcext.offloading.state import LEAST_SLOTS_NBYTES

    run_code(PRELUDE + code, folder, LEAST_SLOTS_NBYTES + 200_000, timeout_s=TIMEOUT_S)


def test_a_child_loads_and_streams(folder):
    run(
        folder,
        """
def work():
    own = load()
    assert torch.equal(logits(own), expected)
    assert own.dcext_offload.statistics().read_nbytes > 0
    forked(lambda: torch.testing.assert_close(logits(load()), expected, rtol=0, atol=0))

forked(work)
assert torch.equal(logits(model), expected)
""",
    )


def test_a_child_is_refused_the_parents_stream_and_makes_its_own(folder):
    run(
        folder,
        """
def work():
    global model
    try:
        logits(model)
        raise AssertionError("no error")
    except RuntimeError as error:
        assert "expected the process that made the stream" in str(error)
    stream = model.dcext_offload.stream
    assert "streamed" in str(model.dcext_offload)
    try:
        stream.read_all()
        raise AssertionError("no error")
    except RuntimeError as error:
        assert "expected the process that made the stream" in str(error)
    dcext.offload(model, host_memory=least)
    assert model.dcext_offload.stream is not stream
    assert torch.equal(logits(model), expected)
    stream.close()
    del stream, model
    gc.collect()

forked(work)
assert torch.equal(logits(model), expected)
""",
    )


def test_a_fork_in_the_middle_of_passes(folder):
    run(
        folder,
        """
done = threading.Event()

def keep_busy():
    torch.set_num_threads(1)
    while not done.is_set():
        logits(model)

def work():
    assert torch.equal(logits(load()), expected)
    model.dcext_offload.stream.statistics()
    model.dcext_offload.stream.close()

threads = [threading.Thread(target=keep_busy, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(10):
    forked(work)
done.set()
for thread in threads:
    thread.join()
""",
    )


def test_a_process_of_multiprocessing(folder):
    run(
        folder,
        """
import multiprocessing

def work(_):
    signal.alarm(100)
    torch.set_num_threads(1)
    return logits(load()).numpy()

with multiprocessing.get_context("fork").Pool(2) as pool:
    for found in pool.map(work, range(4)):
        assert (found == expected.numpy()).all()
""",
    )


def test_gradients_in_a_child(folder):
    run(
        folder,
        """
layer = model.model.layers[0].mlp.up_proj
x = torch.randn(3, 512).requires_grad_()
layer(x).sum().backward()

def work():
    same = x.detach().clone().requires_grad_()
    own = load()  # lives until the gradient has been read too
    own.model.layers[0].mlp.up_proj(same).sum().backward()
    torch.testing.assert_close(same.grad, x.grad)

forked(work)
""",
    )
