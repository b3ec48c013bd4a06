"""Drop-in modules whose weights rest compressed."""

from dcext.nn.embedding import DCEmbedding
from dcext.nn.linear import DCLinear
from dcext.nn.shared_input import share_inputs_

__all__ = ["DCEmbedding", "DCLinear", "share_inputs_"]
