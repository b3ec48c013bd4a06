"""Compressed layers: exact, the same everywhere, and as easy to handle as the ones they replace."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import dcext
from dcext import _C

ISAS = _C.supported_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (tokens, in_features, out_features): odd sizes, tails of every kernel, one and several panels
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (1, 64, 16),
    (5, 65, 17),
    (16, 100, 40),
    (33, 576, 300),
    (70, 3100, 96),
]


def random_layer(
    in_features, out_features, *, codec="auto", activations="int8", bias=True, sigma=20.0
):
    generator = torch.Generator().manual_seed(in_features * 31 + out_features)
    noise = torch.randn(out_features, in_features, generator=generator) * sigma
    qweight = noise.round().clamp(-128, 127).to(torch.int8)
    row_scale = torch.rand(out_features, generator=generator) + 0.01
    col_scale = torch.rand(in_features, generator=generator) + 0.5
    offsets = torch.randn(out_features, generator=generator) if bias else None
    return dcext.DCLinear.from_qweight(qweight, row_scale, col_scale, offsets, codec, activations)


def reference_int8(layer: dcext.DCLinear, x: torch.Tensor) -> torch.Tensor:
    """The formula of DCLinear in plain torch; integer sums in int64."""
    v = x.float() * layer.col_scale
    absmax = v.abs().amax(dim=-1, keepdim=True)
    q = (v * (torch.full_like(absmax, 127) / absmax)).round()  # `127 / x` would be two roundings
    sums = q.long() @ layer.decode_qweight().long().T
    y = sums.float() * layer.row_scale * (absmax / 127)
    return (y if layer.bias is None else y + layer.bias).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_w8a8_is_exact(isa, shape, dtype):
    tokens, in_features, out_features = shape
    x = (torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for bias in (True, False):
        layer = random_layer(in_features, out_features, bias=bias)
        assert torch.equal(layer(x), reference_int8(layer, x))


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_only_is_as_accurate_as_float32(isa, shape):
    tokens, in_features, out_features = shape
    layer = random_layer(in_features, out_features, activations="none")
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(0))
    weight = layer.decode_qweight() * layer.row_scale.double()[:, None] * layer.col_scale.double()
    exact = x.double() @ weight.T + layer.bias
    plain = (x @ weight.float().T + layer.bias).double()
    tolerance = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (layer(x).double() - exact).abs().max() <= tolerance


@pytest.mark.parametrize("activations", ["int8", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_codec_isa_and_number_of_threads(dtype, activations):
    x = torch.randn(37, 640, generator=torch.Generator().manual_seed(0)).to(dtype)
    threads, before = torch.get_num_threads(), _C.selected_isa()
    outputs = []
    try:
        for codec in ("raw", "zstd", "packed"):
            layer = random_layer(640, 1000, codec=codec, activations=activations, sigma=4.0)
            for name in ISAS:
                _C.set_isa(name)
                for num_threads in (1, 2, 3):
                    torch.set_num_threads(num_threads)
                    outputs.append(layer(x))
                    outputs.append(torch.cat([layer(token) for token in x.split(1)]))
    finally:
        torch.set_num_threads(threads)
        _C.set_isa(before)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_many_tokens_and_column_slabs():
    qweight = (torch.randn(200, 300) * 3).round().to(torch.int8)
    layer = dcext.DCLinear(
        dcext.encode(qweight, "zstd", slab_cols=70), torch.ones(200), torch.ones(300)
    )
    x = torch.randn(2, 2100, 300)  # more than one pass of 2,048 tokens
    assert torch.equal(layer(x), reference_int8(layer, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan(isa, value):
    layer = random_layer(100, 30)
    x = torch.randn(6, 100)
    x[2, 50] = value
    y = layer(x)
    assert y[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(y[keep], layer(x[keep]))


def test_zero_tokens_and_zero_activations(isa):
    layer = random_layer(64, 20)
    assert layer(torch.empty(0, 64)).shape == (0, 20)
    assert torch.equal(layer(torch.zeros(3, 64)), layer.bias.expand(3, 20))


def test_inputs_that_are_not_contiguous():
    layer = random_layer(64, 20)
    x = torch.randn(64, 9)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_from_float(granularity):
    linear = nn.Linear(200, 100).bfloat16()
    layer = dcext.DCLinear.from_float(linear, granularity=granularity)
    step = layer.row_scale[:, None]
    assert layer.dtype == torch.bfloat16
    assert ((layer.dequantize().float() - linear.weight.float()).abs() <= step * 0.51 + 1e-3).all()
    assert layer.decode_qweight().abs().max() == 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", ["raw", "zstd", "packed"])
def test_embedding(dtype, codec):
    embedding = nn.Embedding(1000, 96, padding_idx=3).to(dtype)
    compressed = dcext.DCEmbedding.from_float(embedding, codec=codec)
    indices = torch.randint(0, 1000, (4, 50))
    table = (compressed.decode_qweight().float() * compressed.row_scale[:, None]).to(dtype)
    assert torch.equal(compressed(indices), table[indices])
    assert torch.equal(compressed(indices.int()), table[indices])
    assert compressed(indices[:0]).shape == (0, 50, 96)
    assert compressed.padding_idx == 3
    with pytest.raises(IndexError, match=r"\[0, 1000\), got 1000"):
        compressed(torch.tensor([1000]))


def test_casts_keep_scales_and_follow_dtype():
    layer = random_layer(64, 20)
    scales = layer.row_scale.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert layer.to(dtype) is layer
        assert layer.dtype == dtype
        assert torch.equal(layer.row_scale, scales)
        assert layer.payload.dtype == torch.uint8
    assert sum(p.numel() for p in layer.parameters()) == 0


def test_copies_and_pickles():
    layer = random_layer(64, 20)
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


def test_state_dict_replaces_payloads_of_another_length():
    source, target = (
        random_layer(64, 20, codec="zstd", sigma=1.0),
        random_layer(64, 20, codec="raw"),
    )
    assert set(source.state_dict()) == {"payload", "row_scale", "col_scale", "bias"}
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))
    assert target.codec == "zstd"


def test_state_dict_with_a_wrong_payload_is_refused():
    layer = random_layer(64, 20)
    for other, message in [
        (random_layer(64, 21), r"expected shape \(20, 64\)"),
        (None, "checksum"),
    ]:
        state = copy.deepcopy(layer.state_dict())
        if other is None:
            state["payload"][-64] ^= 1
        else:
            state["payload"] = other.payload
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)


def test_repr_tells_shape_codec_ratio_and_tier():
    text = repr(random_layer(64, 20, codec="raw"))
    for part in ("in_features=64", "out_features=20", "bits/weight", "ratio=", "tier=cpu/raw"):
        assert part in text


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda layer: layer(torch.zeros(3, 63)), ValueError),
        (lambda layer: layer(torch.zeros(3, 64, dtype=torch.float64)), TypeError),
        (lambda layer: dcext.DCLinear(layer.payload, torch.ones(19)), ValueError),
        (lambda layer: dcext.DCLinear(layer.payload, torch.ones(20), torch.ones(63)), ValueError),
        (
            lambda layer: dcext.DCLinear(layer.payload, torch.ones(20), activations="int4"),
            ValueError,
        ),
        (
            lambda layer: dcext.DCLinear.from_float(nn.Linear(2, 2), granularity="column"),
            ValueError,
        ),
    ],
)
def test_wrong_arguments(call, error):
    with pytest.raises(error, match="expected"):
        call(random_layer(64, 20))


def test_weights_with_nan_are_refused():
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf in 1 rows"):
        dcext.DCLinear.from_float(linear)


def test_opcheck():
    layer = random_layer(64, 20)
    ops = torch.ops.dcext
    x = torch.randn(3, 64)
    arguments = (x, layer.payload, layer.row_scale, layer.col_scale, layer.bias, "int8")
    torch.library.opcheck(ops.linear.default, arguments)
    embedding = (torch.tensor([1, 2]), layer.payload, layer.row_scale, None, 64, torch.float32)
    torch.library.opcheck(ops.embedding.default, embedding)
    out = torch.empty(20, 64, dtype=torch.int8)
    torch.library.opcheck(ops.decode_out.default, (layer.payload, 0, 20, 0, 64, 0, True, out))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.encode.default, (layer.decode_qweight(), "zstd", 0, 0), test_utils=checks
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_halves_of_linear_make_the_whole(isa, dtype):
    layer = random_layer(100, 30)
    x = torch.randn(2, 7, 100).to(dtype)
    q, act_scale = torch.ops.dcext.quantize_activations(x, layer.col_scale)
    acc = (q.long() @ layer.decode_qweight().long().T).int()
    y = torch.ops.dcext.dequantize(acc, layer.row_scale, act_scale, layer.bias, dtype)
    assert torch.equal(y, layer(x))
    torch.library.opcheck(torch.ops.dcext.quantize_activations.default, (x, layer.col_scale))
    arguments = (acc, layer.row_scale, act_scale, layer.bias, dtype)
    torch.library.opcheck(torch.ops.dcext.dequantize.default, arguments)


def test_torch_compile_keeps_the_graph_whole():
    model = nn.Sequential(random_layer(64, 32), nn.SiLU(), random_layer(32, 8))
    x = torch.randn(5, 64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
