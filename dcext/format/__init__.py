"""The folder that a compressed model is stored in; CONTAINER.md, beside this file, specifies it."""

from dcext.format.reader import CheckpointReader
from dcext.format.writer import write_checkpoint

__all__ = ["CheckpointReader", "write_checkpoint"]
