"""Scorers that compare text."""

import math
import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

import regex
from rapidfuzz.distance import LCSseq

from manylora_evaluator.rows import Row
from manylora_evaluator.scorer_settings import NumericSettings, RegexSettings
from manylora_evaluator.scorers.tally import Tallies, Tally, one

NUMBER = re.compile(
    # What stands between two numbers is no sign: 10-12 holds 10 and 12.
    r"(?:(?<!\w)[-+\N{MINUS SIGN}])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
)
LONGEST_NUMBER = 400
"""Characters; a longer run of digits is no number anybody means."""


class ExactMatch:
    """The answer equals the expected text, letter case included.

    Both are brought to Unicode NFC first; whitespace at the ends is dropped and each run of it
    inside counts as one space.
    """

    def __init__(self, name: str = "exact_match") -> None:
        self.names = (name,)

    def unfit(self, row: Row) -> str | None:
        """Some text is needed."""
        return _needs_text(row)

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """1 for equal, else 0."""
        return {self.names[0]: one(spaced(output) == spaced(row.expected))}


class NormalisedMatch:
    """The answer equals the expected text but for case, whitespace, punctuation and forms.

    Both are brought to Unicode NFKC and case-folded; punctuation and symbols count as spaces.
    """

    def __init__(self, name: str = "normalised_match") -> None:
        self.names = (name,)

    def unfit(self, row: Row) -> str | None:
        """At least one letter or digit is needed."""
        return None if normalised(row.expected) else "has no letters or digits"

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """1 for equal, else 0."""
        return {self.names[0]: one(normalised(output) == normalised(row.expected))}


class RougeL:
    """F-measure of the longest common subsequence of words, averaged over the rows.

    Words are runs of letters, marks, digits and underscores, in Unicode NFC and lower case
    (Lin 2004, with beta 1).
    """

    def __init__(self, name: str = "rouge_l") -> None:
        self.names = (name,)

    def unfit(self, row: Row) -> str | None:
        """At least one word is needed."""
        return None if _words(row.expected) else "has no words"

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """2 LCS over the sum of both lengths."""
        wanted, given = _words(row.expected), _words(output)
        common = LCSseq.similarity(wanted, given)
        return {self.names[0]: (Tally(2 * common / (len(wanted) + len(given)), 1),)}


class Numeric:
    """The number in the answer is within a tolerance of the expected one.

    Right when |given - expected| is at most `absolute`, or `relative` times |expected|. Digits
    may be grouped by commas.
    """

    def __init__(self, settings: NumericSettings) -> None:
        self._settings = settings
        # In decimals, as people wrote them: in binary, 0.3 and 0.4 differ by more than 0.1.
        self._absolute = Decimal(str(settings.absolute))
        self._relative = Decimal(str(settings.relative))
        self.names = (settings.name,)

    def unfit(self, row: Row) -> str | None:
        """One number is needed."""
        return None if _number(row.expected.strip()) is not None else "is not a number"

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """1 for near enough, else 0."""
        expected, given = _number(row.expected.strip()), self._given(output)
        near = (
            expected is not None
            and given is not None
            and abs(given - expected) <= max(self._absolute, self._relative * abs(expected))
        )
        return {self.names[0]: one(near)}

    def _given(self, output: str) -> Decimal | None:
        if self._settings.take == "only":
            return _number(output.strip())
        found = [match.group() for match in NUMBER.finditer(output)]
        if not found:
            return None
        return _number(found[0] if self._settings.take == "first" else found[-1])


class Regex:
    """A pattern is found in the answer, or matches the whole of it.

    The package `regex` can be stopped: a pattern that backtracks for ever on some answer costs
    `timeout_s` and counts as a miss.
    """

    def __init__(self, settings: RegexSettings) -> None:
        flags = regex.IGNORECASE if settings.ignore_case else 0
        self._settings = settings
        self._pattern = regex.compile(settings.pattern, flags)
        self.names = (settings.name,)

    def unfit(self, row: Row) -> str | None:
        """Any row will do, unless a group is compared."""
        return _needs_text(row) if self._settings.group_is_expected else None

    def score(self, output: str, row: Row) -> Mapping[str, Tallies]:
        """1 for a match, else 0."""
        return {self.names[0]: one(self._matches(output.strip(), row))}

    def _matches(self, output: str, row: Row) -> bool:
        find = self._pattern.fullmatch if self._settings.whole else self._pattern.search
        try:
            match = find(output, timeout=self._settings.timeout_s)
        except TimeoutError:
            return False
        if match is None or not self._settings.group_is_expected:
            return match is not None
        return spaced(match.group(1) or "") == spaced(row.expected)


def spaced(text: str) -> str:
    """`text` in NFC with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded(text: str) -> str:
    """`text` in NFKC and case-folded, with single spaces."""
    both = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(both.split())


def normalised(text: str) -> str:
    """`text` in NFKC and case-folded, its letters, marks and digits in words."""
    return " ".join(
        "".join(
            sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in folded(text)
        ).split()
    )


def _needs_text(row: Row) -> str | None:
    return None if row.expected.strip() else "is empty"


def _words(text: str) -> list[str]:
    # The package's words hold marks too: without them most vowels of Hindi are between words.
    return regex.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


def _number(text: str) -> Decimal | None:
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        return None
    plain = text.replace(",", "").replace("\N{MINUS SIGN}", "-")
    value = float(plain)
    if not math.isfinite(value):
        return None
    # Decimals refuse an exponent of more than 18 digits, also where it makes nothing of it.
    return Decimal(plain) if value else Decimal()
