"""Rows of Ray Data, for what a cluster has to read or prepare. The trainer's one use of Ray."""

# Ray is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from manylora_trainer.arrow import rows_of
from manylora_trainer.errors import SourceError
from manylora_trainer.source_settings import RaySource
from manylora_trainer.sources import Place, Row

BATCH_ROWS = 1024
"""Rows taken at once."""
RAISED = re.compile(r"^((?!ray\.)[\w.]+(?:Error|Exception)(?:: .*)?)$", re.MULTILINE)
"""A line of a traceback that names an error of the user's code."""


@dataclass(frozen=True)
class RayDataset:
    """A dataset that a function of the user's builds.

    Blocks are taken in their order, whichever worker is done first, so that a place is the number
    of rows before it. The dataset is computed again up to there when a run is resumed.
    """

    build: Callable[[], Any]
    settings: RaySource

    @property
    def name(self) -> str:
        """The file and the function."""
        return f"{self.settings.file}:{self.settings.function}"

    def rows(self, after: Place | None = None) -> Iterator[Row]:
        """Streams the rows."""
        passed = 0 if after is None else int(after["row"])
        number = 0
        try:
            for batch in self._dataset().iter_batches(
                batch_size=BATCH_ROWS, batch_format="pyarrow"
            ):
                unread = batch.slice(min(max(0, passed - number), len(batch)))
                number += len(batch) - len(unread)
                # Ray's own rows hold numpy values; these are plain lists, numbers and text.
                for part in unread.to_batches():
                    for row in rows_of(part, self.name, number, {}):
                        number = row.number
                        yield row
        except (GeneratorExit, SourceError):
            raise
        except Exception as error:
            # Ray's text is the worker's traceback with advice around it.
            causes = RAISED.findall(str(error)) or [type(error).__name__]
            raise SourceError(f"{self.name} failed after {number} rows: {causes[-1]}") from error

    def _dataset(self) -> Any:
        try:
            import ray
            from ray.data import DataContext, Dataset
        except ImportError as error:
            raise SourceError(
                "rows from Ray Data need a library that is not installed: "
                "pip install 'manylora-trainer[ray]'"
            ) from error
        if not ray.is_initialized():
            # The cluster that RAY_ADDRESS names, or a local one.
            ray.init(log_to_driver=False, include_dashboard=False)
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        dataset = self.build()
        if not isinstance(dataset, Dataset):
            raise SourceError(
                f"{self.name} must return a ray.data.Dataset, returns {type(dataset).__name__}"
            )
        return dataset
