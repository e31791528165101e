"""What xgrammar reads past in a JSON Schema: an answer could break it, so the schema is refused.

vLLM refuses a part of it itself; the rest was found by giving xgrammar 0.2.8 texts that break one
keyword after the other. Left to it are `oneOf`, taken as `anyOf` where branches overlap, and
`contentEncoding`, which no validator checks.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

Schema = Mapping[str, Any]

UNREAD = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "if",
        "multipleOf",
        "not",
        "uniqueItems",
    }
)
"""Read past wherever they are; false asks for nothing."""

UNREAD_WITHOUT_TYPE = frozenset(
    {
        "exclusiveMaximum",
        "exclusiveMinimum",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "pattern",
        "required",
    }
)
SHAPES = frozenset(
    {"additionalProperties", "items", "patternProperties", "prefixItems", "properties"}
)
"""These tell what type is meant."""

COMBINERS = ("$ref", "anyOf", "oneOf", "allOf")
"""Beside the first of them that is there nothing else is read."""
UNREAD_BESIDE = UNREAD_WITHOUT_TYPE | SHAPES | {"const", "enum", "propertyNames", *COMBINERS}

SCHEMAS_BY_NAME = ("$defs", "definitions", "patternProperties", "properties")
LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
SCHEMAS = (
    "additionalProperties",
    "items",
    "unevaluatedItems",
    "unevaluatedProperties",
)


def gaps(schema: Schema) -> Iterator[str]:
    """Each thing in `schema` that an answer would not be held to, once."""
    found: dict[str, None] = {}
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        found.update(dict.fromkeys(_gaps_of(node)))
        waiting.extend(_subschemas(node))
    yield from found


def _gaps_of(node: Schema) -> Iterator[str]:
    """Those of one schema, without the schemas in it."""
    for keyword in sorted(UNREAD & node.keys()):
        if node[keyword] is not False:
            yield f"has {keyword}, to which answers cannot be held"
    reference = node.get("$ref")
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        yield f"has the $ref {reference[:80]!r}; only # and #/… within the schema are followed"
    combiner = next((keyword for keyword in COMBINERS if keyword in node), None)
    if combiner is not None:
        for keyword in sorted(UNREAD_BESIDE & node.keys() - {combiner}):
            yield f"has {keyword} beside {combiner}, where it is not read: move it inside"
        return
    if "type" not in node and not SHAPES & node.keys():
        for keyword in sorted(UNREAD_WITHOUT_TYPE & node.keys()):
            yield f"has {keyword} without a type, where it is not read"
    required, properties = node.get("required"), node.get("properties", {})
    if isinstance(required, list) and isinstance(properties, dict):
        for name in cast("list[object]", required):
            if isinstance(name, str) and name not in properties:
                yield f"requires {name[:80]!r}, which is not among its properties"


def _subschemas(node: Schema) -> Iterator[Schema]:
    for keyword in SCHEMAS_BY_NAME:
        yield from _objects(list(_dict(node.get(keyword)).values()))
    for keyword in LISTS_OF_SCHEMAS:
        yield from _objects(node.get(keyword))
    for keyword in SCHEMAS:
        yield from _objects([node.get(keyword)])
    if "propertyNames" in node:
        yield {"type": "string"} | _dict(node["propertyNames"])


def _dict(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _objects(values: object) -> Iterator[Schema]:
    if isinstance(values, list):
        for value in cast("list[object]", values):
            if isinstance(value, dict):
                yield cast("Schema", value)
