"""The payloads of a model, and the modules that share them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dcext.codec import decode, encode, payload_info
from dcext.nn.compressed import CompressedModule
from dcext.nn.embedding import DCEmbedding
from dcext.policy.tier import Tier
from dcext.weights.origin import Origin, to_weight_memory


@dataclass(frozen=True)
class Weight:
    """A payload and the modules that share it.

    Attributes:
        name: of the first module.
        modules: all of them.
        origin: where it can be read from a file; None if it is in none.
    """

    name: str
    modules: list[CompressedModule]
    origin: Origin | None

    @property
    def module(self) -> CompressedModule:
        """The first."""
        return self.modules[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the payload in its file, or where it is if it is in none."""
        return self.module.payload.nbytes if self.origin is None else self.origin.nbytes

    @property
    def file_codec(self) -> str | None:
        """The codec of the payload in its file; None if it is in none."""
        return None if self.origin is None else payload_info(self.origin.view())["codec"]

    @property
    def tier(self) -> Tier:
        """Where it is on a machine without a device."""
        return Tier("disk" if self.module.is_in_file else "memory", self.module.codec)

    @property
    def disk_tier(self) -> Tier:
        """Where it is when it stays in its file.

        Raises:
            ValueError: it is in none.
        """
        if self.file_codec is None:
            raise ValueError(
                f"{self.name}: expected a payload from a checkpoint, got one that is not in a file"
            )
        return Tier("disk", self.file_codec)

    @property
    def is_looked_up(self) -> bool:
        """Whether a token needs a few rows of it only."""
        return all(isinstance(module, DCEmbedding) for module in self.modules)

    def qweight(self) -> Tensor:
        """Its integers ``(out_features, in_features)`` int8 on the CPU, decoded from where they are, or from their file."""
        module = self.module
        if self.origin is not None and (module.is_in_file or module.payload.device.type != "cpu"):
            return decode(self.origin.view())
        return module.decode_qweight().cpu()

    def payload(self, codec: str, progress: Callable[[int], None] | None = None) -> Tensor:
        """A payload of a codec in host memory: the module's own, or read from the file, or coded anew.

        Args:
            codec: ``"raw"``, ``"packed"`` or ``"zstd"``.
            progress: called with the bytes that were read from a file.
        """
        module = self.module
        if module.codec == codec and not module.is_in_file and module.payload.device.type == "cpu":
            return module.payload
        with torch.inference_mode(False):  # what is made in it could not be moved outside of it
            if self.origin is not None and self.file_codec == codec:
                return self.origin.load(progress)
            return to_weight_memory(encode(self.qweight(), codec))

    def set_payload(self, payload: Tensor) -> None:
        """Gives all modules a payload of the same integers."""
        for module in self.modules:
            module.set_payload(payload)


def weights_of(model: nn.Module) -> list[Weight]:
    """All payloads of a model on the CPU, in the order of the modules that use them.

    Raises:
        ValueError: a module is not on the CPU, or none is compressed.
    """
    weights = all_weights(model)
    for weight in weights:
        device = weight.module.row_scale.device
        if device.type != "cpu":
            raise ValueError(f"{weight.name}: expected the CPU, got a module on {device}")
    return weights


def all_weights(model: nn.Module) -> list[Weight]:
    """All payloads of a model, which may be on a device, in the order of the modules that use them.

    Raises:
        ValueError: none is compressed.
    """
    found: dict[object, Weight] = {}
    for name, module in model.named_modules():
        if not isinstance(module, CompressedModule):
            continue
        origin = module.origin
        key = id(module.payload) if origin is None else (id(origin.reader), origin.name)
        if key in found:
            found[key].modules.append(module)
        else:
            found[key] = Weight(name, [module], origin)
    if not found:
        raise ValueError("model: expected compressed layers, found none")
    return list(found.values())
