"""Rows of Hugging Face datasets on disk."""

# datasets is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manylora_trainer.arrow import rows_of
from manylora_trainer.errors import SourceError
from manylora_trainer.files import why
from manylora_trainer.source_settings import DatasetsSource
from manylora_trainer.sources import Place, Row

BATCH_ROWS = 1024
"""Rows decoded at once."""


@dataclass(frozen=True)
class SavedDataset:
    """A dataset saved by `save_to_disk`, or files that a packaged builder of the library reads.

    A place is the number of rows before it.
    """

    settings: DatasetsSource

    @property
    def name(self) -> str:
        """The path."""
        return self.settings.path

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows of the split."""
        number = 0 if after is None else int(after["row"])
        try:
            dataset = self._load()
            if number and getattr(dataset, "num_rows", None) == number:
                return  # The library refuses to skip all rows.
            for table in dataset.skip(number).iter(BATCH_ROWS):
                for batch in table.to_batches():
                    for row in rows_of(batch, self.name, number, {}):
                        number = row.number
                        yield row
        except (GeneratorExit, SourceError):
            raise
        except Exception as error:
            if number == 0 and isinstance(error, StopIteration | IndexError):
                # How the library says that there is no file, or that no file holds a row.
                raise SourceError(f"{self.name} has no rows") from error
            # The library states no errors of its own: what fails in a builder comes out as it is.
            where = "" if number == 0 else f" behind row {number}"
            raise SourceError(f"{self.name} cannot be read{where}: {why(error)}") from error

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise SourceError(
                "rows from Hugging Face datasets need a library that is not installed: "
                "pip install 'manylora-trainer[datasets]'"
            ) from error
        # What it would say comes with the errors it raises.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        settings = self.settings
        if settings.builder is not None:
            _require_packaged(settings.builder)
            return datasets.load_dataset(
                settings.builder, data_files=settings.path, split=settings.split, streaming=True
            ).with_format("arrow")
        # Whatever it was last formatted for.
        loaded = datasets.load_from_disk(settings.path).with_format("arrow")
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if settings.split not in loaded:
            raise SourceError(
                f"{self.name} has no split {settings.split!r}; it has {', '.join(map(str, loaded))}"
            )
        return loaded[settings.split]


def _require_packaged(builder: str) -> None:
    """Refuses what the library would look for on its hub, and what runs code of the data's."""
    from datasets.packaged_modules import (
        _PACKAGED_DATASETS_MODULES,  # pyright: ignore[reportPrivateUsage]
    )

    if builder == "pandas":
        raise SourceError("the builder pandas reads pickles, which run code: write Parquet instead")
    if builder not in _PACKAGED_DATASETS_MODULES:
        known = ", ".join(sorted({*_PACKAGED_DATASETS_MODULES} - {"pandas"}))
        raise SourceError(f"datasets has no builder {builder!r}; it has {known}")
