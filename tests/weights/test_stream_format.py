"""Files whose checksums hold and whose chunks no writer made: streams refuse them as loading does, on every path."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

import dcext
from dcext import _C
from dcext.offloading.state import LEAST_SLOTS_NBYTES
from matrices import of_width
from packed_reference import encode_packed, reseal

ops = torch.ops.dcext
ROWS, COLS = 40, 96
TOKENS = (1, 3, 16, 17, 300)
OFFSET = 4096


def packed() -> bytearray:
    """Three panels of width 4 with exceptions."""
    qweight = of_width((ROWS, COLS), 4, 0.05)
    return bytearray(encode_packed(qweight.numpy(), widths=[4] * 3, panel_rows=16))


def last_chunk(payload: bytearray) -> int:
    (offset,) = struct.unpack_from("<Q", payload, 64 + 2 * 32)
    return offset


CODES = 64
COUNTS = CODES + 3 * 4 * 64  # one block of three groups of four pieces
COLUMNS = COUNTS + 2 * 16


def broken_packed(kind: str) -> bytearray:
    """With a fault in the last of its panels that the chunk table does not show."""
    payload = packed()
    at = last_chunk(payload)
    if kind == "code under an exception":
        for code in range(at + CODES, at + COUNTS):
            payload[code] = 0xFF
    elif kind == "columns that do not ascend":
        (count,) = struct.unpack_from("<H", payload, at + COUNTS)
        assert count >= 2
        payload[at + COLUMNS + 2 : at + COLUMNS + 4] = payload[at + COLUMNS : at + COLUMNS + 2]
    elif kind == "column that does not exist":
        struct.pack_into("<H", payload, at + COLUMNS, COLS)
    elif kind == "more exceptions than there are":
        struct.pack_into("<H", payload, at + COUNTS, 65535)
    reseal(payload)
    return payload


def broken_zstd() -> bytearray:
    qweight = (torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 3).round()
    payload = bytearray(dcext.encode(qweight.to(torch.int8), "zstd").numpy().tobytes())
    (offset,) = struct.unpack_from("<Q", payload, 64)
    payload[offset] ^= 0xFF  # of the frame's magic number
    reseal(payload)
    return payload


KINDS = {
    kind: lambda kind=kind: broken_packed(kind)
    for kind in (
        "code under an exception",
        "columns that do not ascend",
        "column that does not exist",
        "more exceptions than there are",
    )
} | {"zstd": broken_zstd}


def stream(folder: Path, payload: bytearray, unit: int = -1) -> _C.HostStream:
    path = folder / "payload"
    path.write_bytes(bytes(OFFSET) + payload)
    tensor = torch.frombuffer(payload, dtype=torch.uint8)
    source = ("layer", 0, OFFSET, tensor, unit)
    return _C.HostStream([str(path)], [source], LEAST_SLOTS_NBYTES, True)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_raise_for_any_number_of_tokens(isa, tmp_path, kind):
    made = stream(tmp_path, KINDS[kind]())
    for tokens in TOKENS:
        x = torch.randn(tokens, COLS)
        for activations in ("int8", "none"):
            for _ in range(2):
                with pytest.raises(dcext.FormatError, match=r"layer 'layer' in .*: corrupt data"):
                    ops.linear_streamed(
                        x, made.handle, 0, torch.ones(ROWS), None, None, activations
                    )
        with pytest.raises(dcext.FormatError, match="corrupt data"):
            ops.linear_streamed_input_grad(
                torch.randn(tokens, ROWS), made.handle, 0, torch.ones(ROWS), None, COLS
            )
    with pytest.raises(dcext.FormatError, match="corrupt data"):
        ops.embedding_streamed(
            torch.tensor([ROWS - 1]), made.handle, 0, torch.ones(ROWS), None, COLS, torch.float32
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zstd"])
def test_what_goes_to_a_device_is_checked_when_it_is_read(tmp_path, kind):
    made = stream(tmp_path, KINDS[kind](), unit=0)
    for _ in range(2):
        with pytest.raises(dcext.FormatError, match="table or exceptions"):
            made.read_all()


def test_what_is_in_order_runs_and_has_gradients(isa, tmp_path):
    payload = packed()
    made = stream(tmp_path, payload)
    resident = torch.frombuffer(payload, dtype=torch.uint8)
    scales = (torch.rand(ROWS), torch.rand(COLS))
    for tokens in TOKENS:
        x = torch.randn(tokens, COLS).requires_grad_()
        same = x.detach().clone().requires_grad_()
        y = ops.linear_streamed(x, made.handle, 0, *scales, None, "int8")
        expected = ops.linear(same, resident, *scales, None, "int8")
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(x.grad, same.grad)
    arguments = (x, made.handle, 0, *scales, None, "none")
    torch.library.opcheck(ops.linear_streamed.default, arguments)
    grad = torch.randn(3, ROWS).requires_grad_()
    torch.library.opcheck(
        ops.linear_streamed_input_grad.default, (grad, made.handle, 0, *scales, COLS)
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear_streamed(x, *arguments[1:])
    assert torch.equal(y, ops.linear_streamed(x.bfloat16(), *arguments[1:]))


def in_file(model: torch.nn.Module, name: str) -> tuple[Path, int, int]:
    origin = model.get_submodule(name).origin
    info = origin.reader.info(origin.name)
    return origin.reader.directory / info.file, info.offset, info.nbytes


def test_a_model_that_streams_refuses_such_a_file(tmp_path):
    pytest.importorskip("transformers")
    from models import grouped_llama

    name = "model.layers.0.mlp.up_proj"
    config = dcext.CompressionConfig(recipe="int8", codec="packed")
    model = dcext.compress_(grouped_llama(512, 1024, vocabulary=8192), config)
    layer = model.get_submodule(name)
    data = encode_packed(of_width(layer.shape, 4, 0.05).numpy(), widths=[4] * 16, panel_rows=64)
    layer.set_payload(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dcext.save_pretrained(model, tmp_path / "model")
    path, offset, nbytes = in_file(dcext.from_pretrained(tmp_path / "model"), name)
    with path.open("r+b") as file:
        file.seek(offset)
        payload = bytearray(file.read(nbytes))
        (chunk,) = struct.unpack_from("<Q", payload, 64)
        payload[chunk + CODES : chunk + CODES + 4096] = b"\xff" * 4096
        reseal(payload)
        file.seek(offset)
        file.write(payload)
    streamed = dcext.from_pretrained(tmp_path / "model", host_memory=LEAST_SLOTS_NBYTES + 200_000)
    assert set(streamed.dcext_offload.tiers.values()) == {"disk"}
    for count in (1, 5, 40):
        with torch.inference_mode(), pytest.raises(dcext.FormatError, match=r"up_proj.*corrupt"):
            streamed(torch.arange(count)[None])
