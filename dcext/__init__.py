"""Double compression of language models: weights quantized so that they compress, then entropy-coded.

Importing dcext loads torch and the extension module, and nothing else that is heavy.
"""

from dcext.build import build_info, get_num_threads, set_num_threads
from dcext.codec import decode, encode, entropy, payload_info, verify_payload
from dcext.compress import compress_
from dcext.config import CompressionConfig
from dcext.errors import FormatError
from dcext.integrations.registration import register as _register
from dcext.nn import DCEmbedding, DCLinear
from dcext.offloading.apply import apply
from dcext.offloading.offload import offload
from dcext.planning.adapt import adapt
from dcext.planning.plan import plan
from dcext.pretrained import from_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "CompressionConfig",
    "DCConfig",
    "DCEmbedding",
    "DCLinear",
    "FormatError",
    "adapt",
    "apply",
    "build_info",
    "compress_",
    "decode",
    "encode",
    "entropy",
    "from_pretrained",
    "get_num_threads",
    "offload",
    "payload_info",
    "plan",
    "save_pretrained",
    "set_num_threads",
    "verify_payload",
]

_register()


def __getattr__(name: str) -> object:
    if name == "DCConfig":  # of transformers, which is imported for it
        from dcext.integrations.hf import DCConfig

        return DCConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
