"""Samples: which field is what, captions and labels, and bad text as DataError that names the sample."""

import json
import pickle
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sample import Sample, find_field, modalities_of


def with_json(tree: Any, **fields: bytes) -> Sample:
    return Sample("some/key", {"json": json.dumps(tree).encode(), **fields})


@pytest.mark.parametrize(
    ("names", "image", "audio"),
    [
        (["txt", "jpg"], "jpg", None),
        (["png", "jpg", "wav", "flac"], "jpg", "flac"),
        (["left.jpg", "right.jpg", "png"], "png", None),
        (["right.jpg", "left.jpg"], "left.jpg", None),
        (["jpeg", "ogg"], "jpeg", "ogg"),
        (["jpg.txt", "gif", "mp3"], None, None),
        ([], None, None),
    ],
)
def test_fields_of_image_and_sound(names: list[str], image: str | None, audio: str | None) -> None:
    sample = Sample("k", dict.fromkeys(names, b""))
    assert (sample.image_field, sample.audio_field) == (image, audio)


def test_find_field_does_not_depend_on_order() -> None:
    names = ["b.png", "a.png", "c.jpg"]
    assert find_field(names, ("jpg", "png")) == find_field(names[::-1], ("jpg", "png")) == "c.jpg"


@pytest.mark.parametrize(
    ("names", "modalities"),
    [
        ({"txt", "png"}, ("image", "text")),
        ({"flac"}, ("audio",)),
        ({"ogg", "webp", "txt"}, ("audio", "image", "text")),
        ({"left.jpg", "json"}, ("image",)),
        ({"cls", "json", "caption.txt"}, ()),
    ],
)
def test_modalities(names: set[str], modalities: tuple[str, ...]) -> None:
    assert modalities_of(names) == modalities


def test_caption_of_the_txt_field_is_stripped() -> None:
    assert Sample("k", {"txt": " a \u00e9 cat\r\n".encode()}).captions() == ("a \u00e9 cat",)
    assert Sample("k", {"jpg": b""}).captions() == ()


def test_captions_of_the_json_field_come_before_those_of_txt() -> None:
    assert with_json({"captions": ["one", "two"]}, txt=b"three").captions() == ("one", "two")
    assert with_json({"captions": []}, txt=b"three").captions() == ("three",)
    assert with_json({"other": 1}, txt=b"three").captions() == ("three",)


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u00a0\u2003", "\ufeff", " \ufeff\ufeff\n"])
def test_a_blank_caption_is_none_and_the_next_place_is_looked_at(blank: str) -> None:
    assert with_json({"captions": [blank, blank]}, txt=b"good").captions() == ("good",)
    assert with_json({"captions": [blank, " good "]}, txt=b"other").captions() == ("good",)
    assert with_json({"captions": [blank]}, txt=blank.encode()).captions() == ()
    assert Sample("k", {"txt": blank.encode()}).captions() == ()
    assert with_json({"label": blank}).label() is None
    asked = [{"question": blank, "answer": "a"}, {"question": "q", "answer": blank}, {"question": "q", "answer": "a"}]
    assert with_json({"qa": asked}).questions() == [("q", "a")]


def test_a_byte_order_mark_is_no_part_of_a_caption() -> None:
    assert Sample("k", {"txt": b"\xef\xbb\xbfa cat"}).captions() == ("a cat",)
    assert Sample("k", {"txt": b"\xef\xbb\xbf\r\n"}).captions() == ()
    assert Sample("k", {"txt": 2 * b"\xef\xbb\xbf" + b" a cat"}).captions() == ("a cat",)
    marked = {"captions": ["\ufeffa cat"], "label": "\ufeff cat", "qa": [{"question": "\ufeff", "answer": "a"}]}
    assert with_json(marked).captions() == ("a cat",)
    assert with_json(marked).label() == "cat"
    assert with_json(marked).questions() == []
    for encoding in ("utf-16", "utf-32"):
        with pytest.raises(DataError, match="the txt field of sample 'k' is not UTF-8 but UTF-16"):
            Sample("k", {"txt": "a cat".encode(encoding)}).captions()


@pytest.mark.parametrize("captions", ["one", ["one", 2], {"a": "b"}, 7, [None]])
def test_captions_that_are_no_list_of_texts(captions: Any) -> None:
    with pytest.raises(DataError, match="'some/key' has captions that are not a list of texts"):
        with_json({"captions": captions}).captions()


def test_label() -> None:
    assert with_json({"label": "red cat"}).label() == "red cat"
    assert with_json({"label": 0}).label() == "0"
    assert with_json({"label": 0}).odd_label() == ""
    assert with_json({"label": 1, "similarity": float("nan")}).label() == "1"
    assert with_json({"label": None}).label() is None
    assert with_json({}).label() is None
    assert Sample("k", {"txt": b"x"}).label() is None


def test_names_that_are_not_read_may_stand_twice() -> None:
    data = b'{"exif": {"Padding": 1, "Padding": 2}, "x": 1, "x": 2, "label": "a", "label": "a", "captions": ["c"]}'
    sample = Sample("k", {"json": data})
    assert (sample.captions(), sample.label()) == (("c",), "a")


@pytest.mark.parametrize("label", [float("nan"), float("inf"), 0.5, True, False, [], ["a", "b"], {"name": "cat"}])
def test_a_label_that_names_no_class(label: Any) -> None:
    sample = with_json({"captions": ["x"], "label": label})
    assert (sample.label(), sample.odd_label()) == (None, type(label).__name__)
    assert sample.captions() == ("x",)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"captions": ["first"], "captions": ["second"]}', "has the name 'captions' twice, with different values"),
        (b'{"qa": [{"question": "a", "question": "b", "answer": "c"}]}', "has the name 'question' twice"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[1]", "holds list, not an object"),
        (b'"text"', "holds str, not an object"),
        (b"null", "holds NoneType, not an object"),
    ],
    ids=[
        "a name twice",
        "a name twice inside",
        "open",
        "empty",
        "no text",
        "deep",
        "huge number",
        "list",
        "string",
        "null",
    ],
)
def test_bad_json_names_the_sample(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=f"the json field of sample 'some/key' {words}"):
        Sample("some/key", {"json": data}).metadata()


def test_text_that_is_not_utf_8_names_the_sample() -> None:
    with pytest.raises(DataError, match="the txt field of sample 'k' is not UTF-8"):
        Sample("k", {"txt": b"caf\xe9"}).captions()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    ["a dog runs", "\u0434\u0430", "\u0434\u043e\u043c \u0438 \u043b\u0435\u0441", "caf\u00e9!", "a \u0e01\u0e02 b"],
)
def test_utf_16_without_a_mark_is_no_caption(encoding: str, text: str) -> None:
    with pytest.raises(DataError, match="the txt field of sample 'k' is not UTF-8"):
        Sample("k", {"txt": text.encode(encoding)}).captions()


def test_a_text_of_which_the_end_was_not_written_is_no_caption() -> None:
    with pytest.raises(DataError, match="the txt field of sample 'k' ends in zero bytes"):
        Sample("k", {"txt": b"a capt" + bytes(9)}).captions()


@pytest.mark.parametrize(
    "text", ["a\0b", "\0a dog", "a\tdog\r\n\tand\n\n\n", "\x1b[1ma dog\x1b[0m", "\u0434\u043e\u043c"]
)
def test_a_text_with_few_control_characters_is_one(text: str) -> None:
    assert Sample("k", {"txt": text.encode()}).captions() == (text.strip(),)


def test_half_characters_in_json_are_bad_data_and_not_an_encoder_error_later() -> None:
    with pytest.raises(DataError, match="'some/key' holds text that is not Unicode"):
        with_json({"captions": ["fine", "\ud800"]}).captions()
    with pytest.raises(DataError, match="'some/key' holds text that is not Unicode"):
        with_json({"label": "\udfff"}).label()
    with pytest.raises(DataError, match="'some/key' holds text that is not Unicode"):
        with_json({"qa": [{"question": "q", "answer": "\udfff"}]}).questions()
    assert Sample("k", {"json": rb'{"captions": ["\ud83e\udd86"]}'}).captions() == ("🦆",)


def test_samples_travel_between_processes() -> None:
    sample = with_json({"label": "x"}, jpg=b"\xff\xd8")
    assert pickle.loads(pickle.dumps(sample)) == sample
