"""Has the compressed models of transformers saved as checkpoints of dcext."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dcext.nn.compressed import compressed_modules

_MARK = "_dcext_saves"


def replace_save_pretrained(model_class: Any) -> None:
    """Replaces ``save_pretrained``, and with it what ``push_to_hub`` uploads; models without payloads are saved as ever.

    transformers has no place for it: a quantizer may only change the tensors of a checkpoint that it writes itself, neither
    whole nor with checksums.

    Args:
        model_class: ``transformers.PreTrainedModel``.
    """
    ordinary = model_class.save_pretrained
    if getattr(ordinary, _MARK, False):
        return

    @functools.wraps(ordinary)
    def save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        saves_adapter = getattr(self, "_hf_peft_config_loaded", False)
        if saves_adapter or not compressed_modules(self):
            return ordinary(self, save_directory, *args, **kwargs)
        from dcext.pretrained import save_for_transformers

        return save_for_transformers(self, save_directory, *args, **kwargs)

    setattr(save_pretrained, _MARK, True)
    model_class.save_pretrained = save_pretrained
