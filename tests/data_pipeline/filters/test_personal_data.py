"""Personal data: masked in every text of a sample, or the sample removed; the report does not repeat it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.filters import REPORT_FILE, Change, Drop, parse_steps, run_filters
from data_pipeline.filters.personal_data import PersonalData
from data_pipeline.sample import Sample


def test_captions_questions_and_answers_are_masked_and_provenance_is_not() -> None:
    metadata = {
        "captions": ["Call +49 170 1234567 or ann@example.org", "nothing here"],
        "id": "4111111111111111",
        "qa": [{"question": "Whose is 4111 1111 1111 1111?", "answer": "ann@example.org", "id": 8888}],
        "choice": {"question": "Where?", "choices": ["10.0.0.1", "DE89 3704 0044 0532 0130 00"], "answer": 1},
        "provenance": {"source": "ann@example.org", "licence": None, "id": "8.8.8.8"},
        "url": "http://10.0.0.1/a.jpg",
        "label": "a@b.de",
        "weight": 4111111111111111,
    }
    fields = {
        "jpg": b"ann@example.org",
        "txt": "Call +49 170 1234567 or ann@example.org ☎".encode(),
        "json": json.dumps(metadata).encode(),
        "note.txt": b"from 10.0.0.1",
    }
    outcome = PersonalData().look(Sample("ann@example.org", fields))
    assert isinstance(outcome, Change)
    assert outcome.what == ("email", "iban", "card", "ip", "phone")
    assert outcome.sample.key == "ann@example.org"
    assert outcome.sample.fields["jpg"] == b"ann@example.org"
    assert outcome.sample.fields["txt"].decode() == "Call <phone> or <email> ☎"
    assert outcome.sample.fields["note.txt"] == b"from <ip>"
    assert list(outcome.sample.fields) == list(fields)
    assert json.loads(outcome.sample.fields["json"]) == metadata | {
        "captions": ["Call <phone> or <email>", "nothing here"],
        "qa": [{"question": "Whose is <card>?", "answer": "<email>", "id": 8888}],
        "choice": {"question": "Where?", "choices": ["<ip>", "<iban>"], "answer": 1},
        "label": "<email>",
    }


def test_a_number_that_fails_luhn_stays_to_the_byte() -> None:
    sample = Sample("a", {"txt": b"number 4111111111111112 on a bus", "json": b'{ "captions": ["4111111111111112"] }'})
    assert PersonalData().look(sample) is None
    assert PersonalData(action="remove").look(sample) is None


def test_only_the_kinds_that_were_asked_for() -> None:
    sample = Sample("a", {"txt": b"a@b.de at 10.0.0.1"})
    outcome = PersonalData(kinds=("ip",)).look(sample)
    assert isinstance(outcome, Change)
    assert (outcome.sample.fields, outcome.what) == ({"txt": b"a@b.de at <ip>"}, ("ip",))


def test_removing_names_the_kinds_alone() -> None:
    assert PersonalData(action="remove").look(Sample("a", {"txt": b"a@b.de at 10.0.0.1"})) == Drop("email and ip")


def test_masked_text_has_nothing_left_to_mask() -> None:
    outcome = PersonalData().look(Sample("a", {"txt": b"a@b.de 10.0.0.1 +49 170 1234567 4111111111111111"}))
    assert isinstance(outcome, Change)
    assert PersonalData().look(outcome.sample) is None


def test_neither_the_data_nor_the_report_holds_it_afterwards(
    captioned: Callable[..., Sample], write_set: Callable[..., Path], tmp_path: Path
) -> None:
    samples = [
        captioned("one", "write to ann@example.org", "bob@example.org!"),
        captioned("two", "a dog", qa=[{"question": "carol@example.org?", "answer": "yes"}]),
        captioned("three", "a cat"),
    ]
    folder = write_set("in", samples)
    for action in ("mask", "remove"):
        out = tmp_path / action
        report = run_filters(folder, out, parse_steps([f"personal-data:action={action}", "captions"]), processes=1)
        assert (report.steps[0].changed, report.steps[0].removed) == ((2, 0) if action == "mask" else (0, 2))
        assert b"@" not in b"".join(path.read_bytes() for path in out.glob("*.tar"))
        assert b"@" not in (out / REPORT_FILE).read_bytes()


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="'hide': use one of mask, remove"):
        parse_steps(["personal-data:action=hide"])
    with pytest.raises(ValueError, match="has face: use of email, iban"):
        parse_steps(["personal-data:kinds=email+face"])
