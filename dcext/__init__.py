"""Double compression of language models: weights quantized so that they compress, entropy-coded, decoded just in time.

Importing dcext loads torch, the extension module with its operators, and nothing else that is heavy: each name is loaded
from its module when it is first asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dcext import ops as _ops  # noqa: F401  (registers the operators)
from dcext.integrations.registration import register as _register

if TYPE_CHECKING:
    from dcext.build import build_info, get_num_threads, set_num_threads
    from dcext.codec import decode, encode, entropy, payload_info, verify_payload
    from dcext.compress import compress_
    from dcext.config import CompressionConfig
    from dcext.errors import FormatError
    from dcext.integrations.hf import DCConfig
    from dcext.nn.embedding import DCEmbedding
    from dcext.nn.linear import DCLinear
    from dcext.offloading.apply import apply
    from dcext.offloading.offload import offload
    from dcext.planning.adapt import adapt
    from dcext.planning.plan import plan
    from dcext.pretrained import from_pretrained, save_pretrained

__version__ = "0.1.0"

_MODULES = {
    "build": ("build_info", "get_num_threads", "set_num_threads"),
    "codec": ("decode", "encode", "entropy", "payload_info", "verify_payload"),
    "compress": ("compress_",),
    "config": ("CompressionConfig",),
    "errors": ("FormatError",),
    "integrations.hf": ("DCConfig",),  # imports transformers
    "nn.embedding": ("DCEmbedding",),
    "nn.linear": ("DCLinear",),
    "offloading.apply": ("apply",),
    "offloading.offload": ("offload",),
    "planning.adapt": ("adapt",),
    "planning.plan": ("plan",),
    "pretrained": ("from_pretrained", "save_pretrained"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

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
    if name not in _MODULE_OF:
        if not name.startswith("_") and find_spec(f"dcext.{name}") is not None:
            return import_module(f"dcext.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"dcext.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
