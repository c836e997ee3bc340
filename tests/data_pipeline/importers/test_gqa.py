"""GQA, on a small set in the published form."""

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.gqa import import_gqa


def question(image, text="Is the sky dark?", answer="yes", full="Yes, the sky is dark."):
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": full,
    }


@pytest.fixture
def gqa(put, image_bytes, tmp_path):
    put("train_balanced_questions.json", {"02930152": question("2354786"), "07333408": question("2375429", "What?")})
    put("val_balanced_questions.json", {"1": question("n1"), "2": question("n1", "Who is it?", "boy", "It is a boy.")})
    put("testdev_balanced_questions.json", {"201307251": question("n2")})
    put("test_balanced_questions.json", {"9": {"isBalanced": True, "question": "Who?", "imageId": "n3"}})
    put("train_all_questions/train_all_questions_0.json", "not even read")
    for number, image in enumerate(("2354786", "n1", "n2")):
        put(f"images/{image}.jpg", image_bytes(number, "JPEG"))
    return tmp_path / "source"


def test_three_published_sets(gqa, tmp_path, examine):
    imported = import_gqa(gqa, tmp_path / "out", licence="CC BY 4.0", processes=2)
    sets = examine(tmp_path / "out")
    assert {name: set(samples) for name, samples in sets.items()} == {
        "train": {"2354786"},
        "val": {"n1"},
        "test": {"n2"},
    }
    assert {skip.source: skip.reason for skip in imported.skipped} == {
        "2375429.jpg": "the image file is missing",
        "test_balanced_questions.json": "is of a set without published answers",
    }
    metadata = sets["val"]["n1"].metadata()
    assert metadata["provenance"] == {"source": "GQA balanced", "licence": "CC BY 4.0", "id": "n1"}
    assert metadata["captions"] == ["Is the sky dark? yes", "Who is it? boy"]
    assert metadata["qa"][1] == {
        "kind": "verify",
        "question": "Who is it?",
        "answer": "boy",
        "id": "2",
        "full_answer": "It is a boy.",
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"1": {"imageId": "n1"', "damaged or cut short"),
        ("[]", "does not begin with {"),
        ('{"1": []}', "question 1: is no object"),
        ('{"1": {"imageId": 5}}', "question 1: 'imageId' is a number, where a text should be"),
        ('{"1": {"imageId": "n1", "question": "x"}}', "'answer' is not there"),
        ('{"1": {"imageId": "../../../secret"}}', "outside the data set's folder"),
    ],
)
def test_bad_files_are_one_sentence(gqa, put, tmp_path, data, words):
    for path in gqa.glob("*.json"):
        path.unlink()
    put("train_balanced_questions.json", data)
    with pytest.raises(DataError, match=words):
        import_gqa(gqa, tmp_path / "out")


def test_a_bad_question_costs_itself_and_is_told(gqa, put, tmp_path, examine):
    bad = {"7": 5, "8": {"imageId": "n2", "question": "Why?", "answer": None}}
    put("testdev_balanced_questions.json", {**bad, "201307251": question("n2")})
    put("val_balanced_questions.json", {"1": {"imageId": "n1", "question": "x"}})
    imported = import_gqa(gqa, tmp_path / "out", processes=0)
    sets = examine(tmp_path / "out")
    assert "val" not in sets
    assert [each["id"] for each in sets["test"]["n2"].metadata()["qa"]] == ["201307251"]
    reasons = {skip.source.rpartition("/")[2]: skip.reason for skip in imported.skipped}
    assert reasons["testdev_balanced_questions.json, question 7"] == "is no object"
    assert reasons["testdev_balanced_questions.json, question 8"].startswith("'answer' is null")
    assert reasons["val_balanced_questions.json, question 1"].startswith("'answer' is not there")
    assert "n1.jpg" not in reasons
