"""The language of captions, by py3langid: a model of 4 MB that comes with the package (`pip install 'weft[language]'`).

Captions in another language leave their sample; a sample without one in a wanted language leaves the data set.

Captions are short, and what a model makes of them is half a guess. So what has fewer letters than `min_letters` stays,
and the rest goes where the model is sure that it is in none of the languages to keep. At the default, 96% of 235
English captions of tuxpaint-stamps stay for "en", and of 827 German, French, Spanish and Japanese ones one does; at a
probability of 0.5, only 65% of the English ones would.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_pipeline.filters.step import Drop, Outcome, SampleStep
from data_pipeline.filters.texts import keep_captions
from data_pipeline.sample import Sample


@dataclass(frozen=True)
class Language(SampleStep):
    """Take out captions that are not in one of the languages to keep.

    `keep`: ISO 639-1 codes ("en", "de"). `min_probability`: of the languages to keep together, below which a caption
    goes. `min_letters`: shorter captions are not judged.
    """

    name = "language"

    keep: tuple[str, ...]
    min_probability: float = 0.05
    min_letters: int = 16

    def __post_init__(self) -> None:
        known = known_languages()
        unknown = [code for code in self.keep if code not in known]
        if unknown or not self.keep:
            raise ValueError(f"language:keep has {', '.join(unknown) or 'nothing'}: use of {', '.join(sorted(known))}")
        if not 0 < self.min_probability <= 1:
            raise ValueError(f"language:min_probability is {self.min_probability}: give more than 0, and at most 1")

    def look(self, sample: Sample) -> Outcome:
        return keep_captions(sample, self._judge)

    def _judge(self, caption: str) -> Drop | None:
        if sum(map(str.isalpha, caption)) < self.min_letters:
            return None
        ranked = _identifier().rank(caption)
        wanted = sum(float(probability) for code, probability in ranked if code in self.keep)
        if wanted >= self.min_probability:
            return None
        return Drop(f"not in {' or '.join(self.keep)}", f"{ranked[0][0]}, probability {float(ranked[0][1]):.2f}")


def known_languages() -> frozenset[str]:
    """The codes of the languages that can be told; ValueError when py3langid is not installed."""
    return frozenset(str(code) for code in _identifier().nb_classes)


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(
            "the filter step language needs py3langid, which is not installed: pip install 'weft[language]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
