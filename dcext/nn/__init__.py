"""Drop-in modules whose weights are stored compressed."""

from dcext.nn.embedding import DCEmbedding
from dcext.nn.linear import DCLinear
from dcext.nn.placement import batch_decodes, place, raise_if_damaged

__all__ = ["DCEmbedding", "DCLinear", "batch_decodes", "place", "raise_if_damaged"]
