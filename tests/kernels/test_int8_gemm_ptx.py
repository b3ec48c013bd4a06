"""What the int8 kernels compile to, without a GPU: tensor cores, wide loads, no spills; and how torch traces them."""

from __future__ import annotations

import ast
import re

import pytest
import torch

triton = pytest.importorskip("triton")

from ptx import (  # noqa: E402
    FLOAT_MMA,
    INTEGER_MMA,
    MAX_SHARED_BYTES,
    compile_kernel,
    copied_bytes,
    resources,
)
from torch._functorch.aot_autograd import aot_function  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from dcext.kernels import activation_kernels, int8_gemm_kernels  # noqa: E402
from dcext.kernels import int8_gemm_tuning as tuning  # noqa: E402
from dcext.kernels.activations import quantize_tile, scale_tile  # noqa: E402
from dcext.kernels.int8_gemm import int8_linear  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="requires the compiler, not TRITON_INTERPRET=1"
)
ARCHITECTURES = tuple(MAX_SHARED_BYTES)
# The largest tiles, and nothing else, take all 255 registers without wgmma; a few pointers are spilled.
MAX_SPILLED_BYTES = 128
TYPES = {
    "qweight": "*i8",
    "row_scale": "*fp32",
    "act_scale": "*fp32",
    "bias": "*fp32",
    "x": "*bf16",
    "outlier_index": "*i32",
    "outlier_weight": "*bf16",
    "y": "*bf16",
}
CHOICES = {
    itemsize: [config for most in tuning._TILES for config in tuning.choices(most, itemsize)]
    for itemsize in (1, 2)
}
DEFAULTS = {
    itemsize: [tuning.choices(most, itemsize)[0] for most in tuning._TILES] for itemsize in (1, 2)
}


def compile_multiply(architecture: int, config, activations: str, outliers: bool = False):
    """As ``int8_linear`` would launch it; activations ``i8``, ``fp16`` or ``bf16``."""
    types = TYPES | {"prepared": f"*{activations}"}
    constants: dict[str, object] = dict(config.kwargs)
    if activations != "i8":
        constants["act_scale"] = None
        types |= {"x": f"*{activations}", "y": f"*{activations}"}
    if not outliers:
        constants |= dict.fromkeys(("outlier_index", "outlier_weight"))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compile_kernel(tuning.multiply, architecture, types, constants, options)


def tile_name(config) -> str | None:
    """Of a test's parameter."""
    if not isinstance(config, triton.Config):
        return None
    sizes = "x".join(str(config.kwargs[name]) for name in ("ROWS", "TOKENS", "COLS", "SPLITS"))
    return f"{sizes}-{config.num_warps}-{config.num_stages}"


def is_large(config) -> bool:
    return config.kwargs["ROWS"] * config.kwargs["TOKENS"] == 128 * 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", dict.fromkeys(CHOICES[1]), ids=tile_name)
def test_w8a8(config, architecture, tmp_path, record_property):
    """Every choice but those that Triton leaves out for their shared memory."""
    compiled = compile_multiply(architecture, config, "i8")
    ptx = compiled.asm["ptx"]
    found = resources(compiled, tmp_path, record_property)
    assert re.search(INTEGER_MMA, ptx)
    assert copied_bytes(ptx) == {16}
    assert "fma.rn.f32" not in ptx  # products and sums are rounded apart, whatever the options
    may_spill = is_large(config) and architecture != 90
    assert found.spilled_bytes <= (MAX_SPILLED_BYTES if may_spill else 0)
    if config in DEFAULTS[1]:
        assert found.shared_bytes <= min(MAX_SHARED_BYTES.values())
    else:
        assert found.shared_bytes <= MAX_SHARED_BYTES[architecture] or architecture == 120


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        *((config, architecture) for config in DEFAULTS[2] for architecture in (90, 100)),
        *((config, architecture) for config in DEFAULTS[2][::5] for architecture in (80, 120)),
    ],
    ids=tile_name,
)
def test_w8a16(config, architecture, tmp_path, record_property):
    activations = "fp16" if config.kwargs["TOKENS"] > 16 else "bf16"
    compiled = compile_multiply(architecture, config, activations)
    ptx = compiled.asm["ptx"]
    found = resources(compiled, tmp_path, record_property)
    type_name = {"fp16": "f16", "bf16": "bf16"}[activations]
    # Fewer than 64 rows are no tile for wgmma and tcgen05.
    instruction = FLOAT_MMA[architecture if config.kwargs["ROWS"] >= 64 else 80]
    assert re.search(instruction.format(type_name), ptx)
    assert copied_bytes(ptx) <= {8, 16}  # 8 where weights go into the registers of wgmma
    assert found.spilled_bytes == 0
    assert found.shared_bytes <= min(MAX_SHARED_BYTES.values())


@pytest.mark.parametrize("config", CHOICES[2][-5:], ids=tile_name)
def test_w8a16_without_spills_on_hopper(config, tmp_path, record_property):
    found = resources(compile_multiply(90, config, "bf16"), tmp_path, record_property)
    assert found.spilled_bytes == 0
    assert found.shared_bytes <= MAX_SHARED_BYTES[90]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", [DEFAULTS[1][0], DEFAULTS[1][-1]], ids=tile_name)
def test_outliers(config, architecture, tmp_path, record_property):
    compiled = compile_multiply(architecture, config, "i8", outliers=True)
    ptx = compiled.asm["ptx"]
    found = resources(compiled, tmp_path, record_property)
    assert re.search(r"(mma\S*tf32|tcgen05\.mma\S*tf32)", ptx)
    assert "fma.rn.f32" not in ptx
    assert found.spilled_bytes == 0
    assert found.shared_bytes <= min(MAX_SHARED_BYTES.values())


def test_every_wgmma_is_as_wide_as_its_tile():
    """64 rows times up to 256 tokens; two warpgroups of a tile share its rows or its tokens."""
    for config in DEFAULTS[1]:
        if config.kwargs["ROWS"] < 64:
            continue
        widths = re.findall(
            r"wgmma\S*m64n(\d+)k32\S*s8", compile_multiply(90, config, "i8").asm["ptx"]
        )
        assert widths
        assert int(widths[0]) * 2 >= config.kwargs["TOKENS"]


def prepared_tiles(name: str) -> list[dict[str, int]]:
    tile = {"quantize": quantize_tile, "scale": scale_tile}[name]
    return [tile(1, 896), tile(1, 28672), tile(300, 4096, transposed=True)]


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("name", ["quantize", "scale"])
def test_preparation(name, architecture, tmp_path, record_property):
    kind = "*i8" if name == "quantize" else "*bf16"
    types = {"x": "*bf16", "col_scale": "*fp32", "act_scale": "*fp32", "out": kind, "out_t": kind}
    for tile in prepared_tiles(name):
        constants: dict[str, object] = {k: v for k, v in tile.items() if k != "num_warps"}
        if tile["TOKENS"] == 1:
            constants["out_t"] = None
        options = {"num_warps": tile["num_warps"]}
        kernel = getattr(activation_kernels, name)
        compiled = compile_kernel(kernel, architecture, types, constants, options)
        ptx = compiled.asm["ptx"]
        assert "fma.rn.f32" not in ptx
        assert "div.full" not in ptx  # approximate
        assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
        assert resources(compiled, tmp_path, record_property).spilled_bytes == 0


class NoDriver:
    """Stands in for the driver of an H100 while torch reads what kernels mutate; nothing runs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def no_driver(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.runtime.driver, "_active", NoDriver())


def traced(count, mode: FakeTensorMode, activations: str, **options) -> torch.fx.Graph:
    """What the backend of torch.compile is given."""
    graphs = []

    def keep(module, _):
        graphs.append(module.graph)
        return module

    def layer(x, qweight, row_scale, col_scale, index, weight):
        return int8_linear(
            x, qweight, row_scale, col_scale, None, (index, weight), activations
        ).relu()

    with mode, torch.no_grad():
        arguments = (
            torch.empty((count, 64), dtype=torch.bfloat16, device="cuda"),
            torch.empty((32, 64), dtype=torch.int8, device="cuda"),
            torch.empty(32, device="cuda"),
            torch.empty(64, device="cuda"),
            torch.empty(3, dtype=torch.int32, device="cuda"),
            torch.empty((32, 3), dtype=torch.bfloat16, device="cuda"),
        )
        y = aot_function(layer, keep, **options)(*arguments)
    assert y.shape == (count, 32)
    assert y.dtype == torch.bfloat16
    return graphs[0]


def kernels_of(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    wrapper = torch.ops.higher_order.triton_kernel_wrapper_functional
    return [node for node in graph.nodes if node.target is wrapper]


@pytest.mark.parametrize("activations", ["int8", "none"])
def test_torch_compile_sees_two_kernels(activations, no_driver):
    """And that they write to their outputs alone."""
    prepare, multiply = kernels_of(traced(5, FakeTensorMode(), activations))
    written = {"int8": ["out", "act_scale"], "none": ["out"]}[activations]
    assert prepare.kwargs["tensors_to_clone"] == written
    assert multiply.kwargs["tensors_to_clone"] == ["y"]
    assert multiply.kwargs["kwargs"]["bucket"] == 8
    assert len(multiply.kwargs["grid"]) == len(tuning.choices(8, 1))


def test_torch_compile_with_any_number_of_tokens(no_driver):
    """One graph for all of a class."""
    shapes = torch.fx.experimental.symbolic_shapes
    environment = shapes.ShapeEnv()
    symbol = environment.create_symbol(
        100,
        torch._dynamo.source.ConstantSource("tokens"),
        dynamic_dim=shapes.DimDynamic.DYNAMIC,
    )
    count = environment.create_symintnode(symbol, hint=100)
    graph = traced(count, FakeTensorMode(shape_env=environment), "int8", dynamic=True)
    _, multiply = kernels_of(graph)
    assert isinstance(multiply.kwargs["kwargs"]["M"], torch.fx.Node)
    assert multiply.kwargs["kwargs"]["bucket"] == 0
    bounds = environment.var_to_range[symbol]
    assert bounds.lower == 65
    assert bounds.upper == 256


@pytest.mark.parametrize("module", [activation_kernels, int8_gemm_kernels])
def test_torch_compile_can_copy_the_constants(module):
    """It writes kernels to a file of its own, and constants as Python prints them."""
    constants = [v for v in vars(module).values() if isinstance(v, triton.language.constexpr)]
    assert constants
    for constant in constants:
        assert ast.literal_eval(repr(constant.value)) == constant.value


def test_classes_and_buckets():
    assert [tuning.token_class(tokens) for tokens in (1, 8, 9, 64, 65, 257, 10**6)] == [
        8,
        8,
        16,
        64,
        256,
        2**31,
        2**31,
    ]
    buckets = [tuning.token_bucket(tokens) for tokens in (1, 8, 9, 100, 4096, 10**6)]
    assert buckets == [8, 8, 16, 128, 4096, 4096]


@pytest.mark.parametrize(("value", "count"), [("0", 1), ("1", 4)])
def test_tuning_can_be_switched_off(value, count, monkeypatch):
    monkeypatch.setenv("DCEXT_AUTOTUNE", value)
    tuners = tuning._tuners.__wrapped__(tuning.multiply)
    assert len(tuners[8, 1].configs) == count
    assert tuners[8, 1].cache_results
    assert set(tuners[8, 1].keys) <= set(tuning.multiply.arg_names)


def test_an_unknown_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("DCEXT_AUTOTUNE", "off")
    with pytest.raises(ValueError, match="DCEXT_AUTOTUNE: expected 0 or 1, got 'off'"):
        tuning._tuners.__wrapped__(tuning.multiply)
