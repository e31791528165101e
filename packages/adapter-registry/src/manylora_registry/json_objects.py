"""JSON objects in which a key stands once.

Of a key that stands there twice it is anybody's guess which value counts (RFC 8259, section 4).
"""

from collections import Counter
from typing import Any


class RepeatedKeyError(ValueError):
    """An object has a key more than once."""


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its `pairs`: what `json.loads` takes as `object_pairs_hook`.

    Raises:
        RepeatedKeyError: a key stands there more than once.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RepeatedKeyError(f"the key {twice[:80]!r} stands in an object twice")
    return fields
