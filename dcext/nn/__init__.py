"""Drop-in modules whose weights rest compressed."""

from dcext.nn.device import batch_decodes, place, raise_if_damaged
from dcext.nn.embedding import DCEmbedding
from dcext.nn.linear import DCLinear

__all__ = ["DCEmbedding", "DCLinear", "batch_decodes", "place", "raise_if_damaged"]
