"""Layers whose weights rest as on a GPU: decoded by their seek index and multiplied by Triton kernels."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from matrices import gaussian

triton = pytest.importorskip("triton")

import dcext  # noqa: E402
from dcext.nn.placement import batch_decodes, place, raise_if_damaged  # noqa: E402
from dcext.weights.indexed import IndexedWeight, decode_together  # noqa: E402
from dcext.weights.resident import make_resident, shared_result  # noqa: E402
from triton_modes import (  # noqa: E402
    DEVICE,
    on_device,
    on_gpu,
    requires_interpreter,
    run_in_interpreter,
)

CODECS = ["raw", "zstd", "packed"]


@requires_interpreter
def test_this_file_in_the_interpreter():
    assert run_in_interpreter(__file__) > 0


def layer(codec: str, rows=40, cols=96, activations="int8", outliers=False) -> dcext.DCLinear:
    qweight = gaussian(rows, cols, 3.0, seed=rows)
    index = torch.tensor([3, 50], dtype=torch.int32)
    columns = torch.randn(rows, 2).bfloat16() if outliers else None
    if outliers:
        qweight[:, index.long()] = 0
    return dcext.DCLinear(
        dcext.encode(qweight, codec),
        torch.rand(rows) + 0.1,
        torch.rand(cols) + 0.5,
        torch.randn(rows),
        activations,
        outliers=(index, columns) if outliers else None,
    )


def backing(module: dcext.DCLinear) -> dcext.DCLinear:
    """The module as ``.to("cuda")`` leaves it; in the interpreter on the CPU."""
    if DEVICE == "cuda":
        return module.cuda()
    module._move_to(torch.device("cpu"))
    return module


@on_device
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_bits_of_the_cpu(codec, tokens):
    module = layer(codec)
    x = torch.randn(2, tokens, 96)
    expected = module(x)
    assert torch.equal(backing(module)(x.to(DEVICE)).cpu(), expected)
    assert module.codec == codec


@on_device
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("activations", ["int8", "none"])
def test_outliers_and_float_activations(codec, activations):
    module = layer(codec, activations=activations, outliers=True)
    x = torch.randn(3, 96).half()  # Triton's interpreter multiplies the bits of bfloat16
    expected = module(x).float()
    found = backing(module)(x.to(DEVICE)).cpu().float()
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=float(expected.abs().max()) / 256)


@on_device
def test_a_block_decodes_together():
    block = nn.Sequential(layer("zstd", 96), nn.GELU(), layer("raw", 96), layer("zstd", 20))
    x = torch.randn(4, 96)
    expected = block(x)
    for module in block:
        if isinstance(module, dcext.DCLinear):
            backing(module)
    batch_decodes(block)
    batch_decodes(block)
    assert len(block._forward_pre_hooks) == 1
    assert torch.equal(block(x.to(DEVICE)).cpu(), expected)
    assert all(getattr(module, "decoded", None) is None for module in block)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 96\)"):
        block(torch.randn(4, 95, device=DEVICE))
    assert block[0].decoded is None


@on_device
def test_embedding_rows():
    embedding = nn.Embedding(50, 64)
    indices = torch.randint(50, (3, 4))
    for codec in CODECS:
        module = dcext.DCEmbedding.from_float(embedding, codec=codec)
        expected = module(indices)
        if DEVICE == "cuda":
            module.cuda()
        else:
            module._move_to(torch.device("cpu"))
        assert torch.equal(module(indices.to(DEVICE)).cpu(), expected)
        assert torch.equal(module.decode_qweight().cpu(), dcext.decode(module.payload.cpu()))


def test_modules_that_share_a_payload_share_what_rests():
    payload = dcext.encode(gaussian(40, 96, 3.0), "zstd")
    cpu = torch.device("cpu")
    first = make_resident(payload, cpu)
    assert make_resident(payload, cpu) is first
    assert make_resident(payload.clone(), cpu) is not first
    del first
    assert shared_result(payload, cpu, lambda: torch.zeros(1)).numel() == 1


def test_raw_weights_are_not_copied():
    qweight = gaussian(40, 96, 60.0)
    weight = IndexedWeight(dcext.encode(qweight, "raw"), "cpu")
    assert torch.equal(weight.qweight(), qweight)
    assert weight.qweight().data_ptr() == weight.view.data_ptr()
    # Panels of 20,000 rows of 9 are followed by padding.
    qweight = gaussian(60_000, 9, 60.0)
    weight = IndexedWeight(dcext.encode(qweight, "raw"), "cpu")
    assert weight.view is None
    assert torch.equal(weight.qweight(), qweight)


def test_frames_with_matches_rest_raw():
    repeats = gaussian(16, 64, 3.0).repeat(40, 8)
    payload = dcext.encode(repeats, "zstd", level=19)
    with pytest.warns(UserWarning, match="zstd level 19 has matches"):
        weight = IndexedWeight(payload, "cpu")
    assert torch.equal(weight.qweight(), repeats)
    module = dcext.DCLinear(payload, torch.ones(len(repeats)))
    with pytest.warns(UserWarning, match="resident as raw INT8"):
        module._move_to(torch.device("cpu"))
    assert module.codec == "raw"
    assert torch.equal(dcext.decode(module.payload), repeats)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IndexedWeight(dcext.encode(repeats, "zstd"), "cpu")


def test_damage_in_memory_is_found():
    module = layer("zstd", 200)
    module._move_to(torch.device("cpu"))
    weight = module.backing
    raise_if_damaged(module)
    weight.payload[200:2000] = 255
    weight.qweight()
    with pytest.raises(dcext.FormatError, match="found a segment that ends elsewhere"):
        raise_if_damaged(nn.Sequential(module))


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires a machine without a GPU")
def test_no_gpu():
    with pytest.raises(RuntimeError, match="expected 'cpu', as torch finds no GPU, got 'cuda:1'"):
        place(nn.Sequential(layer("zstd")), "cuda:1")


def test_blocks_of_a_model_are_found():
    model = nn.Module()
    model.experts = nn.ModuleList([layer("raw", 8)])
    model.layers = nn.ModuleList([nn.Sequential(layer("zstd", 96)) for _ in range(2)])
    place(model, "cpu")
    assert not any(block._forward_pre_hooks for block in model.layers)
    place(model, "meta")
    assert all(block._forward_pre_hooks for block in model.layers)
    assert not any(block._forward_pre_hooks for block in model.experts)


def test_compiled_without_a_break():
    """The operator mutates a list of tensors; torch.compile must keep the order of decode and use."""
    torch._dynamo.reset()
    matrices = [gaussian(40, 96, 3.0), gaussian(33, 96, 1.0)]
    weights = [IndexedWeight(dcext.encode(matrix, "zstd"), "cpu") for matrix in matrices]

    def products(x):
        return [x @ matrix.float().t() for matrix in decode_together(weights)]

    x = torch.randn(3, 96)
    found = torch.compile(products, fullgraph=True)(x)
    for y, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(y, x @ matrix.float().t())


@on_device
@pytest.mark.parametrize("together", [False, True])
def test_a_block_is_traced_whole(together):
    torch._dynamo.reset()
    block = nn.Sequential(layer("zstd", 96), nn.GELU(), layer("raw", 96), layer("zstd", 20))
    for module in block:
        if isinstance(module, dcext.DCLinear):
            backing(module)
    if together:
        batch_decodes(block)
    x = torch.randn(4, 96, device=DEVICE)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x + 1), block(x + 1))


@on_gpu
@pytest.mark.parametrize("codec", CODECS)
def test_there_and_back(codec):
    module = layer(codec)
    x = torch.randn(4, 96)
    expected = module(x)
    stored = module.payload.clone()
    module.cuda()
    assert module.payload.is_cuda
    loaded = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    module.load_state_dict(loaded)
    assert torch.equal(module(x.cuda()).cpu(), expected)
    module.cpu()
    assert torch.equal(module.payload, stored)
    assert torch.equal(module(x), expected)


@on_gpu
def test_cuda_graph():
    block = nn.Sequential(layer("zstd", 96), layer("zstd", 96)).cuda()
    batch_decodes(block)
    x = torch.randn(4, 96, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, block(x))
    raise_if_damaged(block)


@on_gpu
def test_compiled_on_a_gpu():
    torch._dynamo.reset()
    block = nn.Sequential(layer("zstd", 96), layer("packed", 96)).cuda()
    x = torch.randn(4, 96, device="cuda")
    expected = block(x)
    torch.testing.assert_close(torch.compile(block)(x), expected)
