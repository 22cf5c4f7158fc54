"""Text that is the same but for its writing."""

import unicodedata
from dataclasses import dataclass

from composer.formats.recipes.suite import Example
from composer.formats.recipes.tasks import MatchSettings


@dataclass(frozen=True, slots=True)
class TextMatch:
    """1 if answer and completion are the same text after normalization, else 0."""

    settings: MatchSettings

    def __call__(self, answer: str, example: Example) -> float:
        return float(normalized(answer, self.settings) == normalized(example.completion, self.settings))


def normalized(text: str, settings: MatchSettings) -> str:
    """The text in Unicode's form NFKC, with single spaces; in one case, and without punctuation, unless they count."""
    text = unicodedata.normalize("NFKC", text)
    if not settings.case:
        text = text.casefold()
    if not settings.punctuation:
        text = "".join(one for one in text if not unicodedata.category(one).startswith("P"))
    return " ".join(text.split())
