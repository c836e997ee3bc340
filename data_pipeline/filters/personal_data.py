"""Personal data in the texts of a sample: masked, so that "write to ann@example.org" is "write to <email>", or removed.

Every txt and json field is searched: captions, questions and answers, and whatever else the json holds, but for what
says where a sample comes from (`KEPT`), which must stay true. Names of people are not found: that takes a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.filters.patterns import KINDS, find_personal_data
from data_pipeline.filters.step import Change, Drop, Outcome, SampleStep
from data_pipeline.filters.texts import replace_texts
from data_pipeline.sample import Sample

ACTIONS = ("mask", "remove")
KEPT = ("id", "key", "md5", "provenance", "sha256", "url")


@dataclass(frozen=True)
class PersonalData(SampleStep):
    """Mask e-mail addresses, phone, card and bank numbers and network addresses, or remove samples with them.

    `action`: "mask" or "remove" (the sample). `kinds`: of email, iban, card, ip and phone.
    """

    name = "personal-data"

    action: str = "mask"
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"personal-data:action is {self.action!r}: use one of {', '.join(ACTIONS)}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"personal-data:kinds has {', '.join(unknown) or 'nothing'}: use of {', '.join(KINDS)}")

    def look(self, sample: Sample) -> Outcome:
        found: dict[str, None] = {}
        changed = replace_texts(sample, self._masker(found), KEPT)
        if not found:
            return None
        kinds = tuple(kind for kind in KINDS if kind in found)
        return Drop(" and ".join(kinds)) if self.action == "remove" else Change(changed, kinds)

    def _masker(self, found: dict[str, None]) -> Callable[[str], str]:
        """The function that masks a text, and notes in `found` what kinds it met."""

        def mask(text: str) -> str:
            places = find_personal_data(text, self.kinds)
            for start, end, kind in reversed(places):
                found[kind] = None
                text = f"{text[:start]}<{kind}>{text[end:]}"
            return text

        return mask
