"""Drop-in modules whose weights rest compressed."""

from dcext.nn.embedding import DCEmbedding
from dcext.nn.linear import DCLinear

__all__ = ["DCEmbedding", "DCLinear"]
