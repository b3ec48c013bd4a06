"""Models of torch itself, which no config describes."""

from torch import Tensor, nn

from .family import Family, built, is_matrix, noise

SIZES = {"d_model": 64, "nhead": 4, "dim_feedforward": 192, "batch_first": True}


def encoder() -> nn.Module:
    """Its layers are copies of one, so they are drawn anew."""
    layer = nn.TransformerEncoderLayer(**SIZES)
    model = nn.TransformerEncoder(layer, num_layers=2)
    for parameter in filter(is_matrix, model.parameters()):
        nn.init.xavier_uniform_(parameter)
    return model


def transformer() -> nn.Module:
    return nn.Transformer(num_encoder_layers=2, num_decoder_layers=2, **SIZES)


def source(model: nn.Module) -> dict[str, Tensor]:
    return {"src": noise(2, 16, 64)}


def source_and_target(model: nn.Module) -> dict[str, Tensor]:
    return {"src": noise(2, 16, 64), "tgt": noise(2, 8, 64, seed=1)}


def itself(output: Tensor) -> Tensor:
    return output


FAMILIES: list[Family] = [
    Family("torch_encoder", "plain", lambda: built(encoder), source, itself, requires="torch"),
    Family(
        "torch_transformer",
        "plain",
        lambda: built(transformer),
        source_and_target,
        itself,
        requires="torch",
    ),
]
