"""The versions of one registry as directories, made when they are asked for."""

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from manylora_registry.blobs import BlobStore
from manylora_registry.cache import Cache
from manylora_registry.catalog import Catalog
from manylora_registry.errors import CorruptBlobError, DeletedError, DestinationError
from manylora_registry.materialize import materialize
from manylora_registry.reference import AdapterReference
from manylora_registry.version import Version


class Files:
    """Makes them, and holds what was asked for without a place until it is closed."""

    def __init__(self, blobs: BlobStore, catalog: Catalog) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._leases = ExitStack()
        self._held: dict[str, Path] = {}
        self._holding = threading.Lock()

    def close(self) -> None:
        """Gives back what is held in the cache."""
        self._leases.close()
        self._held.clear()

    def materialize(self, version: Version, directory: Path) -> Path:
        """The version's directory below `directory`, to stay.

        Raises:
            CorruptBlobError: a stored blob is damaged; nothing is left behind.
            DestinationError: `directory` is full or cannot be written.
            DeletedError: the version was deleted and its bytes were collected.
        """
        with self._stated(version, directory):
            return materialize(self._blobs, version.digest, directory)

    def held(self, version: Version) -> Path:
        """The version's directory in the cache of the environment, held until this is closed.

        Raises: as `materialize` does.
        """
        with self._holding:
            known = self._held.get(version.digest)
            # Somebody may have cleared the cache, and with it the lease.
            if known is None or not known.is_dir():
                held = self.hold(version, Cache.from_environment())
                self._held[version.digest] = self._leases.enter_context(held)
                return self._held[version.digest]
            return self.materialize(version, known.parent)

    @contextmanager
    def hold(self, version: Version, cache: Cache) -> Generator[Path]:
        """The version's directory in a cache, which keeps it until the block ends.

        Raises: as `materialize` does.
        """
        with ExitStack() as held:
            with self._stated(version, cache.directory):
                path = held.enter_context(cache.hold(self._blobs, version.digest))
            yield path

    @contextmanager
    def _stated(self, version: Version, directory: Path) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(
                f"{version.name}@{version.number} cannot be written to {directory}: "
                f"{error.strerror}; make room there or name another directory"
            ) from error
        except CorruptBlobError as error:
            found = self._catalog.find(AdapterReference(version.name, str(version.number)))
            if found.collected:
                raise DeletedError(
                    f"{version.name}@{version.number} was deleted and its bytes are gone"
                ) from error
            raise
