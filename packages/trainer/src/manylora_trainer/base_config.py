"""A base's transformers configuration, read without its weights."""

# transformers is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportMissingTypeStubs=false

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from manylora_trainer.errors import UnsupportedBaseError


def text_config_of(base: Path) -> Any:
    """The part of a base's configuration that is about text.

    Raises:
        UnsupportedBaseError: it cannot be used.
    """
    try:
        return AutoConfig.from_pretrained(base, local_files_only=True).get_text_config()
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedBaseError(f"{base}: its config.json cannot be used: {error}") from error
