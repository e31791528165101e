"""How an answer is compared with what was expected."""

from collections.abc import Sequence

from manylora_evaluator.rows import Row
from manylora_evaluator.scorer_settings import (
    AnyScorer,
    ClassificationSettings,
    ExactMatchSettings,
    JsonFieldF1Settings,
    JsonSchemaSettings,
    JsonValidSettings,
    JudgeSettings,
    NormalisedMatchSettings,
    NumericSettings,
    PairwiseSettings,
    RegexSettings,
    RougeLSettings,
    SqlSettings,
)
from manylora_evaluator.scorers.classification import Classification
from manylora_evaluator.scorers.json_answers import JsonFieldF1, JsonSchema, JsonValid
from manylora_evaluator.scorers.sql import Sql
from manylora_evaluator.scorers.tally import Scorer
from manylora_evaluator.scorers.text import ExactMatch, NormalisedMatch, Numeric, Regex, RougeL


def make_scorer(settings: AnyScorer, rows: Sequence[Row]) -> Scorer | None:
    """The scorer that `settings` describe; None for those a language model scores.

    Raises:
        FixtureError: the script of a database fails.
    """
    match settings:
        case ExactMatchSettings():
            return ExactMatch(settings.name)
        case NormalisedMatchSettings():
            return NormalisedMatch(settings.name)
        case JsonValidSettings():
            return JsonValid(settings.name)
        case JsonFieldF1Settings():
            return JsonFieldF1(settings)
        case JsonSchemaSettings():
            return JsonSchema(settings)
        case RougeLSettings():
            return RougeL(settings.name)
        case ClassificationSettings():
            return Classification(settings, rows)
        case NumericSettings():
            return Numeric(settings)
        case RegexSettings():
            return Regex(settings)
        case SqlSettings():
            return Sql(settings)
        case JudgeSettings() | PairwiseSettings():
            return None
