"""VCR, on a small set in the published form."""

import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.vcr import import_vcr, sentence
from data_pipeline.scenes.dice import Dice, stream
from data_pipeline.scenes.questions import multiple_choice, questions
from data_pipeline.scenes.world import scene

OBJECTS = ["person", "person", "dog", "bottle"]


def question(number, image, part="train", **changes):
    record = {
        "movie": "1054_Harry_Potter",
        "objects": OBJECTS,
        "interesting_scores": [0, -1],
        "answer_likelihood": "possible",
        "img_fn": image,
        "metadata_fn": image.replace(".jpg", ".json"),
        "question_orig": "How is 1 feeling?",
        "question": ["How", "is", [0], "feeling", "about", [1, 2], "'", "s", "bottle", "?"],
        "answer_choices": [
            [[0], "doesn", "'", "t", "care", "."],
            [[0, 1, 2], "are", "glad", "."],
            ["No", ",", "never", "."],
            ["It", "is", [3], "."],
        ],
        "answer_label": 1,
        "rationale_choices": [[[place % 4], "is", "smiling", str(place), "."] for place in range(4)],
        "rationale_label": 2,
        "img_id": f"{part}-0",
        "question_number": 0,
        "annot_id": f"{part}-{number}",
        "match_fold": f"{part}-0",
        "match_index": 0,
    }
    return record | changes


def lines(*records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


IMAGE = "lsmdc_1054_Harry_Potter/1054_Harry_Potter_00.34.33.123-00.34.35.321@0.jpg"


@pytest.fixture
def vcr(put, image_bytes, tmp_path):
    put("train.jsonl", lines(question(0, IMAGE), question(1, IMAGE), question(2, "movieclips_A/gone@1.jpg")))
    put("val.jsonl", lines(question(0, "movieclips_B/b@2.jpg", "val")))
    put("test.jsonl", lines({"img_fn": "movieclips_C/c.jpg"}))
    put(f"vcr1images/{IMAGE}", image_bytes(1, "JPEG"))
    put("vcr1images/movieclips_B/b@2.jpg", image_bytes(2, "JPEG"))
    return tmp_path / "source"


def test_questions_answers_and_reasons_in_words(vcr, tmp_path, examine):
    imported = import_vcr(vcr, tmp_path / "out", processes=2)
    assert {skip.source: skip.reason for skip in imported.skipped} == {
        "movieclips_A/gone@1.jpg": "the image file is missing"
    }
    sets = examine(tmp_path / "out")
    assert {name: set(samples) for name, samples in sets.items()} == {
        "train": {IMAGE},
        "test": {"movieclips_B/b@2.jpg"},
    }
    metadata = sets["train"][IMAGE].metadata()
    assert metadata["objects"] == OBJECTS
    assert metadata["provenance"] == {"source": "VCR", "licence": None, "id": IMAGE}
    asked = "How is person1 feeling about person2 and dog3's bottle?"
    assert metadata["captions"] == [f"{asked} person1, person2 and dog3 are glad."]
    assert [each["id"] for each in metadata["qa"]] == ["train-0", "train-1"]
    assert metadata["choice"][1] == {
        "question": asked,
        "choices": [
            "person1 doesn't care.",
            "person1, person2 and dog3 are glad.",
            "No, never.",
            "It is bottle4.",
        ],
        "answer": 1,
        "rationales": [f"{OBJECTS[place]}{place + 1} is smiling {place}." for place in range(4)],
        "rationale": 2,
        "id": "train-1",
    }


def test_the_form_is_that_of_the_scene_world(vcr, tmp_path, examine):
    import_vcr(vcr, tmp_path / "out", processes=0)
    metadata = examine(tmp_path / "out")["train"][IMAGE].metadata()
    shown, dice = scene(0, 0), Dice(stream(0, "train words", 0))
    ours = {"qa": questions(shown, dice), "choice": [multiple_choice(shown, dice)]}
    assert set(metadata["choice"][0]) - set(ours["choice"][0]) == {"id"}
    assert set(metadata["qa"][0]) - set(ours["qa"][0]) == {"id"}
    assert set(ours["choice"][0]) < set(metadata["choice"][0])
    for found in (metadata, ours):
        for each in found["choice"]:
            assert isinstance(each["choices"][each["answer"]], str)
            assert isinstance(each["rationales"][each["rationale"]], str)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": ["How", "is", [4], "?"]}, r"train\.jsonl line 1: \[4\] is neither a word nor a list of places"),
        ({"question": [[-1]]}, "neither a word"),
        ({"question": [[True]]}, "neither a word"),
        ({"question": [5]}, "neither a word"),
        ({"answer_label": 4}, "'answer_label' is 4, of 4 choices"),
        ({"rationale_choices": ["x"]}, "'rationale_choices' holds something else"),
        ({"objects": [1]}, "'objects' holds something else than texts"),
        ({"rationale_label": None}, "'rationale_label' is null, where a number should be"),
    ],
)
def test_a_damaged_line_is_one_sentence_and_costs_itself(vcr, put, tmp_path, changes, words):
    (vcr / "val.jsonl").unlink()
    put("train.jsonl", lines(question(0, IMAGE, **changes)))
    with pytest.raises(DataError, match=words):
        import_vcr(vcr, tmp_path / "out")
    put("train.jsonl", lines(question(0, IMAGE, **changes), question(1, IMAGE)))
    imported = import_vcr(vcr, tmp_path / "out", processes=0)
    assert imported.train.index.samples == 1
    (skip,) = imported.skipped
    assert skip.source.endswith("train.jsonl line 1")


def test_a_file_cut_short_names_the_line(vcr, put, tmp_path):
    put("train.jsonl", lines(question(0, IMAGE), question(1, IMAGE))[:-40])
    imported = import_vcr(vcr, tmp_path / "out", processes=0)
    (skip,) = imported.skipped
    assert skip.source.endswith("train.jsonl line 2")
    assert skip.reason.startswith("is not JSON, damaged or cut short")


def test_images_stay_in_their_folder(vcr, put, tmp_path, image_bytes):
    put("secret.jpg", image_bytes(9, "JPEG"))
    put("train.jsonl", lines(question(0, "../secret.jpg")))
    imported = import_vcr(vcr, tmp_path / "out", processes=0)
    assert imported.train is None
    assert "outside the data set's folder" in imported.skipped[0].reason


def test_words_become_text():
    said = [
        "Why",
        "isn",
        "'",
        "t",
        [0],
        "'",
        "s",
        "dog",
        "(",
        [2],
        ")",
        ",",
        "the",
        "'",
        "big",
        "'",
        "one",
        ",",
        "here",
        "?",
    ]
    assert sentence(said, OBJECTS, "x") == "Why isn't person1's dog ( dog3), the ' big ' one, here?"
