"""Tiny random models of many families, each with a calibration set for it, and what calibration makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dcext
import zoo
from dcext.calibrate.coded import CodedLayer
from dcext.calibrate.inputs import model_inputs
from dcext.calibrate.job import Job
from dcext.calibrate.layers import write_matrix
from dcext.calibrate.resume import ResumeFolder
from dcext.calibrate.source import BlockSource
from dcext.calibrate.stacks import find_blocks, linear_layers
from dcext.calibrate.tree import first_float
from dcext.nn.matrix import matrix_of
from dcext.quantize.data_free import round_data_free
from zoo.check import calibration_of

hf = pytest.importorskip("transformers")

Case = tuple[nn.Module, Any]
VOCABULARY = 128
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def ids(windows: int = 6, tokens: int = 12, seed: int = 1) -> Tensor:
    """Tokens from 3 on, as unequally frequent as words are."""
    uniform = torch.rand((windows, tokens), generator=torch.Generator().manual_seed(seed))
    return (3 + (VOCABULARY - 3) * uniform.pow(2)).long()


def floats(*shape: int, seed: int = 1) -> Tensor:
    """Smooth in their last dimensions, so that neighbours depend on each other."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise + 2 * noise.mean(-1, keepdim=True) * shape[-1] ** 0.5


def made(model_class: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return model_class(config).eval()


def decoder(name: str, **changes: Any) -> Case:
    config = hf.AutoConfig.for_model(name, **{**SMALL, "head_dim": 16, **changes})
    return made(hf.AutoModelForCausalLM.from_config, config), ids()


def gemma3() -> Case:
    return decoder("gemma3_text", num_key_value_heads=2, sliding_window=8)


def zamba() -> Case:
    return decoder(
        "zamba",
        num_hidden_layers=6,
        attn_layer_period=3,
        attn_layer_offset=2,
        num_key_value_heads=4,
        attention_head_dim=32,
        attention_hidden_size=128,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )


def rwkv() -> Case:
    config = hf.RwkvConfig(
        hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY
    )
    return made(hf.RwkvForCausalLM, config), ids()


def xlm() -> Case:
    config = hf.XLMConfig(emb_dim=64, n_layers=2, n_heads=4, vocab_size=VOCABULARY)
    return made(hf.XLMWithLMHeadModel, config), {"input_ids": ids()}


def bert_base() -> Case:
    return made(hf.BertModel, hf.BertConfig(**SMALL)), ids()


def t5(**changes: Any) -> Case:
    settings = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(
        **{**settings, "vocab_size": VOCABULARY, "decoder_start_token_id": 0, **changes}
    )
    return made(hf.T5ForConditionalGeneration, config), ids()


def _bart(model_class: Any, config_class: Any, **changes: Any) -> nn.Module:
    config = config_class(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        vocab_size=VOCABULARY,
        **{"max_position_embeddings": 32, "init_std": 0.1, **changes},
    )
    return made(model_class, config)


def bart() -> Case:
    return _bart(hf.BartForConditionalGeneration, hf.BartConfig), ids()


def whisper() -> Case:
    model = _bart(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig,
        max_position_embeddings=None,
        max_source_positions=16,
        max_target_positions=16,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return model, {"input_features": floats(6, 8, 32), "decoder_input_ids": ids()}


def encodec() -> Case:
    """Its convolutions have weight norm: their weights are other tensors each time."""
    config = hf.EncodecConfig(
        num_filters=32, hidden_size=64, codebook_size=16, codebook_dim=64, upsampling_ratios=[4, 2]
    )
    return made(hf.EncodecModel, config), {"input_values": floats(4, 1, 480)}


def vit() -> Case:
    config = hf.ViTConfig(**VISION, num_labels=10)
    return made(hf.ViTForImageClassification, config), floats(6, 3, 16, 16)


def segformer() -> Case:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[32, 64],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=5,
    )
    return made(hf.SegformerForSemanticSegmentation, config), floats(6, 3, 32, 32)


def llava() -> Case:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**SMALL),
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=2,
        image_seq_length=16,
    )
    tokens = torch.cat([torch.full((6, 16), 2), ids()], 1)
    model = made(hf.LlavaForConditionalGeneration, config)
    return model, {"input_ids": tokens, "pixel_values": floats(6, 3, 16, 16)}


class Stage(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inner, outer), nn.Linear(outer, outer)

    def forward(self, x: Tensor, *, time: Tensor, skip: Tensor | None = None) -> tuple[Tensor, ...]:
        x = x if skip is None else torch.cat([x, skip], -1)
        y = self.second(self.first(x).relu()) + time
        return y, x.mean()


class UNet(nn.Module):
    """Skip connections from each block on the way down to one on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 64)
        self.down_blocks = nn.ModuleList(Stage(64, 64) for _ in range(2))
        self.mid_block = Stage(64, 64)
        self.up_blocks = nn.ModuleList(Stage(128, 64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        time = self.time(x.mean(-1, keepdim=True))
        skips = []
        for block in self.down_blocks:
            x, _ = block(x, time=time)
            skips.append(x)
        x, _ = self.mid_block(x, time=time)
        for block in self.up_blocks:
            x, _ = block(x, time=time, skip=skips.pop())
        return x


def unet() -> Case:
    return made(lambda _: UNet(), None), floats(6, 20, 64)


class Containers(nn.Module):
    """Blocks that are never called, only their parts, with keywords; one returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}) for _ in range(2)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer["b"](input=layer["a"](input=x).relu())
        return {"sample": x}


def containers() -> Case:
    return made(lambda _: Containers(), None), floats(6, 20, 64)


def of_zoo(name: str) -> Callable[[], Case]:
    """A family of the zoo, with windows like its inputs."""

    def case() -> Case:
        family = zoo.FAMILIES[name]
        model = family.model()
        return model, calibration_of(family.inputs(model))

    return case


# Of the zoo, and what it has not, or has in shapes so small that rounding them without text is hard to beat.
OF_ZOO = (
    *(
        "llama",
        "gpt2",
        "gemma3_text",
        "gemma4_text",
        "mixtral",
        "jamba",
        "recurrent_gemma",
        "mamba",
    ),
    *("bert", "albert", "deberta_v2", "t5", "bart", "marian", "whisper", "wav2vec2"),
    *(
        "vit",
        "dinov2",
        "swin",
        "convnext",
        "clip",
        "llava",
        "qwen2_vl",
        "detr",
        "torch_transformer",
    ),
)
FAMILIES: dict[str, Callable[[], Case]] = {
    **{name: of_zoo(name) for name in OF_ZOO},
    "zamba": zamba,
    "rwkv": rwkv,
    "xlm": xlm,
    "bert_base": bert_base,
    "encodec": encodec,
    "segformer": segformer,
    "unet": unet,
    "containers": containers,
}


def no_progress(label: str, share: float) -> None:
    """Reports nothing."""


def calibrate(
    model: nn.Module,
    calibration: Any,
    config: dcext.CompressionConfig,
    resume: ResumeFolder | None = None,
    progress: Callable[[str, float], None] = no_progress,
    source: BlockSource | None = None,
) -> dict[str, CodedLayer]:
    """Compresses the layers of a model's blocks and gives it the approximations as weights."""
    coded: dict[str, CodedLayer] = {}

    def emit(name: str, layer: CodedLayer) -> None:
        coded[name] = layer
        if source is None:
            write_matrix(model.get_submodule(name), layer.dequantize())

    names = {name for block in find_blocks(model) for name in linear_layers(block)}
    source_or_memory = source or BlockSource()
    config.method.compress(
        Job(model, source_or_memory, calibration, config, names, emit, progress, resume)
    )
    assert set(coded) == names
    return coded


def stored_bits(model: nn.Module, coded: dict[str, CodedLayer]) -> float:
    """Bits per weight, what is shared counted once."""
    layers = {id(layer): (name, layer) for name, layer in coded.items()}.values()
    weights = sum(matrix_of(model.get_submodule(name)).numel() for name, _ in layers)
    return 8 * sum(layer.report.stored_nbytes for _, layer in layers) / weights


def round_without_data(model: nn.Module, bits: float) -> None:
    """Recipe ``data-free`` on the layers of a model's blocks, their scales counted but not the coder's excess."""
    for block in find_blocks(model):
        for layer in linear_layers(block).values():
            weight = matrix_of(layer).float()
            quantized = round_data_free(weight, bits - 16 / weight.shape[1])
            write_matrix(layer, quantized.dequantize())


@torch.no_grad()
def output_of(model: nn.Module, calibration: Any) -> Tensor:
    """The first floating-point tensor that a model returns: logits, or hidden states."""
    output = first_float(model_inputs(model, calibration).call(model))
    assert output is not None
    return output


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())
