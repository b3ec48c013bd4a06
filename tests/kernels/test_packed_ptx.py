"""What the packed kernels compile to, without a GPU: tensor cores, wide loads, no spills, and the right look-ups."""

from __future__ import annotations

import re

import numpy as np
import pytest

triton = pytest.importorskip("triton")

from ptx import (  # noqa: E402
    FLOAT_MMA,
    INTEGER_MMA,
    MAX_SHARED_BYTES,
    compile_kernel,
    copied_bytes,
    resources,
)

from dcext.kernels import packed, packed_kernels  # noqa: E402
from dcext.kernels.packed_lookup import (  # noqa: E402
    lookup_asm,
    lookup_constraints,
    stored_bytes,
    table_words,
)
from packed_reference import WIDTHS, unpack_codes  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="requires the compiler, not TRITON_INTERPRET=1"
)
MAX_SPILLED_BYTES = 32
MULTIPLY = {
    "payload": "*u8",
    "tiles": "*i64",
    "row_ptr": "*i32",
    "column": "*i32",
    "delta": "*i16",
    "row_scale": "*fp32",
    "act_scale": "*fp32",
    "bias": "*fp32",
    "y": "*bf16",
}


def compile_multiply(architecture: int, activations: str, tokens: int, exceptions: bool = True):
    """``multiply`` as ``packed_linear`` would launch it; activations ``i8``, ``fp16`` or ``bf16``."""
    types = MULTIPLY | {"x": f"*{activations}", "x_t": f"*{activations}"}
    constants: dict[str, object] = dict(packed._config(tokens, 1 if activations == "i8" else 2))
    if activations != "i8":
        constants["act_scale"] = None
    if not exceptions:
        constants |= dict.fromkeys(("row_ptr", "column", "delta", "x_t"))
    unaligned = ("stride_t",) if tokens < 16 else ()
    return compile_kernel(
        packed_kernels.multiply, architecture, types, constants, packed._OPTIONS, unaligned
    )


def check_resources(compiled, tmp_path, record_property) -> None:
    found = resources(compiled, tmp_path, record_property)
    assert found.spilled_bytes <= MAX_SPILLED_BYTES
    assert found.shared_bytes <= min(MAX_SHARED_BYTES.values())


@pytest.mark.parametrize(
    ("architecture", "tokens"), [(80, 16), (90, 1), (90, 128), (100, 128), (120, 1)]
)
def test_w8a8_uses_integer_tensor_cores(architecture, tokens, tmp_path, record_property):
    compiled = compile_multiply(architecture, "i8", tokens)
    ptx = compiled.asm["ptx"]
    assert re.search(INTEGER_MMA, ptx)
    assert "fma.rn.f32" not in ptx  # products and sums are rounded apart
    check_resources(compiled, tmp_path, record_property)


@pytest.mark.parametrize(
    ("architecture", "activations", "tokens"),
    [(80, "bf16", 1), (90, "fp16", 64), (100, "bf16", 64), (120, "fp16", 64)],
)
def test_w8a16_uses_tensor_cores(architecture, activations, tokens, tmp_path, record_property):
    compiled = compile_multiply(architecture, activations, tokens)
    type_name = {"fp16": "f16", "bf16": "bf16"}[activations]
    assert re.search(FLOAT_MMA[architecture].format(type_name), compiled.asm["ptx"])
    check_resources(compiled, tmp_path, record_property)


def test_codes_are_copied_in_vectors_of_16_bytes():
    """Without exceptions all asynchronous copies are of codes and activations."""
    ptx = compile_multiply(90, "i8", 1, exceptions=False).asm["ptx"]
    assert copied_bytes(ptx) == {16}


def run_ptx(asm: str, operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Interprets the few instructions of ``lookup_asm`` on arrays of uint32."""
    values = dict(operands)

    def operand(name: str) -> np.ndarray:
        return values[name] if name in values else np.uint32(int(name, 0))

    for line in asm.strip("{}\n").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        instruction, rest = line.split(maxsplit=1)
        target, *sources = (part.strip() for part in rest.split(","))
        a, b, *c = (operand(source) for source in sources)
        values[target] = {
            "and.b32": lambda a=a, b=b: a & b,
            "or.b32": lambda a=a, b=b: a | b,
            "shl.b32": lambda a=a, b=b: a << b,
            "shr.u32": lambda a=a, b=b: a >> b,
            "prmt.b32": lambda a=a, b=b, c=c: permute_bytes(a, b, c[0]),
        }[instruction]()
    return values


def permute_bytes(a, b, selector) -> np.ndarray:
    """``prmt``: byte i of the result is the one of b:a that half byte i of the selector names."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for i in range(4):
        chosen = (np.asarray(selector, np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        assert (chosen < 8).all()  # bit 3 would replicate a sign
        result |= (both >> chosen * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return result.astype(np.uint32)


@pytest.mark.parametrize("width", WIDTHS)
def test_lookup_assembly(width):
    """The assembly on random pieces gives what the reference reads out of them."""
    rng = np.random.default_rng(width)
    groups = 50
    stored = rng.integers(0, 256, (groups, width, 16, 4), np.uint8)
    table = np.zeros(4 * max(table_words(width), 2), np.int8)
    table[: 2**width] = rng.permutation(np.arange(-128, 128))[: 2**width]
    codes = unpack_codes(stored.tobytes(), (16, 32 * groups), width)
    expected = table[codes].reshape(16, groups, 2, 4, 4).transpose(1, 0, 2, 3, 4)
    words = table.view(np.uint32)
    for piece in range(4):
        bytes_in = [stored[:, piece if width >= 4 else piece % 2]]
        if width in (3, 5):
            bytes_in.append(stored[:, -1])
        if width == 6:
            bytes_in.append(stored[:, 4 + piece % 2])
        assert len(bytes_in) == stored_bytes(width)
        inputs = [np.ascontiguousarray(part).view(np.uint32)[..., 0] for part in bytes_in]
        inputs += [np.full_like(inputs[0], word) for word in words for _ in range(4)]
        operands = {f"${2 + i}": value for i, value in enumerate(inputs)}
        assert lookup_constraints(width) == ",".join(["=r"] * 2 + ["r"] * len(operands))
        found = run_ptx(lookup_asm(width, piece), operands)
        for half in range(2):
            weights = found[f"${half}"].view(np.int8).reshape(groups, 16, 4)
            assert np.array_equal(weights, expected[:, :, half, piece])
