"""One of several processes that publish, move aliases and materialize at the same time.

`racer.py DATABASE BLOBS CACHE BASE.JSON MOVES ADAPTER...`; starts at a line on stdin, then prints
what it did as JSON.
"""

import json
import sys
from pathlib import Path

from manylora_registry import BaseModelIdentity, Registry
from manylora_registry.errors import AliasConflictError

database, blobs, cache, base_file, moves, *directories = sys.argv[1:]
record = json.loads(Path(base_file).read_text())
base = BaseModelIdentity(
    record["fingerprint"], {name: tuple(shape) for name, shape in record["tensors"].items()}
)


def move_once(registry: Registry) -> int:
    """Moves the alias to the latest version; how often somebody else was faster."""
    conflicts = 0
    while True:
        (adapter,) = registry.adapters()
        alias = adapter.aliases.get("production")
        expect = alias.generation if alias else 0
        try:
            move = registry.set_alias(
                "spelling", "production", adapter.latest.number, expect=expect
            )
        except AliasConflictError:
            conflicts += 1
        else:
            assert move.generation == expect + 1
            return conflicts


print("ready", flush=True)
sys.stdin.readline()
published = {}
conflicts = 0
with Registry.open(database=database, blobs=blobs) as registry:
    for directory in directories:
        version = registry.publish("spelling", Path(directory), base=base)
        published[directory] = version.number
        registry.materialize(version, Path(cache))
        registry.materialize(registry.find("spelling@1"), Path(cache))
    for _ in range(int(moves)):
        conflicts += move_once(registry)
print(json.dumps({"published": published, "conflicts": conflicts}))
