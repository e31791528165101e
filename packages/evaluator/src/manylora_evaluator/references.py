"""Adapter references in a suite, checked before anything is asked."""

from typing import Annotated

from pydantic import AfterValidator

from manylora_registry.errors import InvalidReferenceError
from manylora_registry.reference import AdapterReference


def _well_formed(text: str) -> str:
    try:
        AdapterReference.parse(text)
    except InvalidReferenceError as error:
        raise ValueError(str(error)) from error
    return text


def _well_formed_or_empty(text: str) -> str:
    return text and _well_formed(text)


Reference = Annotated[str, AfterValidator(_well_formed)]
"""`NAME[@SELECTOR]`."""
ReferenceOrBase = Annotated[str, AfterValidator(_well_formed_or_empty)]
"""The same, or nothing for the bare base."""
