"""Languages of captions, by the real model; and a clear word where it is not installed."""

import sys
from collections.abc import Callable

import pytest

from data_pipeline.filters import Change, Drop, parse_steps
from data_pipeline.filters.language import Language, _identifier
from data_pipeline.sample import Sample

ENGLISH = "A brown dog runs along the beach with a stick in its mouth"
GERMAN = "Ein brauner Hund läuft mit einem Stock im Maul am Strand entlang"
FRENCH = "Un chien brun court le long de la plage avec un bâton dans la gueule"


@pytest.fixture
def model() -> None:
    pytest.importorskip("py3langid")


@pytest.mark.usefixtures("model")
def test_captions_in_other_languages_go(captioned: Callable[..., Sample]) -> None:
    step = Language(("en",))
    assert step.look(captioned("a", ENGLISH)) is None
    outcome = step.look(captioned("a", GERMAN, FRENCH))
    assert isinstance(outcome, Drop)
    assert outcome.reason == "not in en"
    assert outcome.detail.startswith("de, probability 0.9")
    changed = step.look(captioned("a", GERMAN, ENGLISH, FRENCH))
    assert isinstance(changed, Change)
    assert changed.sample.captions() == (ENGLISH,)
    sure = Language(("en",), min_probability=1.0).look(captioned("a", ENGLISH))
    assert isinstance(sure, Drop)
    assert sure.detail.startswith("en, probability")
    both = Language(("en", "de")).look(captioned("a", GERMAN, ENGLISH, FRENCH))
    assert isinstance(both, Change)
    assert both.sample.captions() == (GERMAN, ENGLISH)


@pytest.mark.usefixtures("model")
def test_short_captions_are_not_judged(captioned: Callable[..., Sample]) -> None:
    assert Language(("en",)).look(captioned("a", "ein Hund", "123 456 789 000 111 222")) is None
    assert isinstance(Language(("en",), min_letters=4).look(captioned("a", "der große Hund")), Drop)


@pytest.mark.usefixtures("model")
def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"language:keep has xx: use of .*de,"):
        parse_steps(["language:keep=en+xx"])
    with pytest.raises(ValueError, match="min_probability is 2"):
        parse_steps(["language:keep=en,min_probability=2"])
    with pytest.raises(ValueError, match="needs the option keep"):
        parse_steps(["language"])


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    _identifier.cache_clear()
    with pytest.raises(ValueError, match=r"needs py3langid, .* pip install 'weft\[language\]'"):
        parse_steps(["language:keep=en"])
