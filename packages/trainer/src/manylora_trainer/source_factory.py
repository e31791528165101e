"""The sources that recipes can name."""

from manylora_trainer.jsonl import JsonLines
from manylora_trainer.mix import Mix, Part, Spread
from manylora_trainer.python_source import PythonFunction, load_function
from manylora_trainer.source_settings import (
    DatasetsSource,
    JsonlSource,
    MixSource,
    ParquetSource,
    PythonSource,
    RaySource,
    SourceSettings,
    SqlSource,
)
from manylora_trainer.sources import Source


def open_source(settings: SourceSettings, seed: str = "") -> Source:
    """The source that a recipe describes; nothing is read yet.

    `seed` decides the order in which sources and parts of them are drawn from, and nothing else.
    """
    match settings:
        case JsonlSource():
            return Spread(JsonLines(settings.locations), seed)
        case PythonSource():
            return PythonFunction(settings.file, settings.function)
        case ParquetSource():
            from manylora_trainer.parquet import ParquetFiles

            return Spread(ParquetFiles(settings.locations), seed)
        case SqlSource():
            from manylora_trainer.sql import SqlRows

            return SqlRows(settings)
        case DatasetsSource():
            from manylora_trainer.hf_datasets import SavedDataset

            return SavedDataset(settings)
        case RaySource():
            from manylora_trainer.ray_data import RayDataset

            return RayDataset(load_function(settings.file, settings.function), settings)
        case MixSource():
            parts = [
                Part(open_source(part.source, f"{seed}/{index}"), part.weight)
                for index, part in enumerate(settings.sources)
            ]
            return Mix(parts, seed)
