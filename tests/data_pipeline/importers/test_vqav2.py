"""VQAv2, on a small set in the published form."""

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.vqav2 import import_vqav2

LICENCE = {
    "url": "http://creativecommons.org/licenses/by/4.0/",
    "name": "Creative Commons Attribution 4.0 International License",
}
SAID = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "pitcher", "orange"]


def questions(name, numbers):
    listed = [
        {"image_id": number // 1000, "question": f"What is number {number}?", "question_id": number}
        for number in numbers
    ]
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": LICENCE,
        "data_subtype": name,
        "questions": listed,
    }


def answers(name, numbers):
    listed = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "net",
            "answers": [
                {"answer": said, "answer_confidence": "maybe", "answer_id": place}
                for place, said in enumerate(SAID, start=1)
            ],
            "image_id": number // 1000,
            "answer_type": "other",
            "question_id": number,
        }
        for number in numbers
    ]
    return {"info": {}, "license": LICENCE, "data_subtype": name, "annotations": listed, "data_type": "mscoco"}


@pytest.fixture
def vqa(put, image_bytes, tmp_path):
    """Train: five questions about two images; val: one about one. And test, which has no answers."""
    for name, numbers in (("train2014", [9000, 9001, 9002, 25000, 25001]), ("val2014", [42000])):
        put(f"v2_OpenEndedQuestions_mscoco_{name}_questions.json", questions(name, numbers))
        put(f"v2_mscoco_{name}_annotations.json", answers(name, numbers[::-1]))
        for image in {number // 1000 for number in numbers}:
            put(f"images/{name}/COCO_{name}_{image:012d}.jpg", image_bytes(image, "JPEG"))
    put("v2_OpenEndedQuestions_mscoco_test2015_questions.json", questions("test2015", [1000]))
    return tmp_path / "source"


def test_one_sample_an_image_with_ten_answers_a_question(vqa, tmp_path, examine, image_bytes):
    imported = import_vqav2(vqa, tmp_path / "out", processes=2)
    assert imported.reasons() == {"is of a set without published answers": 1}
    sets = examine(tmp_path / "out")
    assert {name: set(samples) for name, samples in sets.items()} == {"train": {"9", "25"}, "test": {"42"}}
    sample = sets["train"]["9"]
    assert sample.fields["jpg"] == image_bytes(9, "JPEG")
    assert sample.captions() == tuple(f"What is number {number}? net" for number in (9000, 9001, 9002))
    metadata = sample.metadata()
    assert metadata["provenance"] == {"source": "VQAv2", "licence": LICENCE["name"], "id": 9}
    assert [question["id"] for question in metadata["qa"]] == [9000, 9001, 9002]
    assert metadata["qa"][0] == {
        "kind": "other",
        "question": "What is number 9000?",
        "answer": "net",
        "answers": SAID,
        "id": 9000,
    }
    assert "choice" not in metadata


def test_what_cannot_be_used_is_told(vqa, put, tmp_path, examine):
    tree = answers("train2014", [9000, 25000, 25001])
    del tree["annotations"][0]["multiple_choice_answer"]
    tree["annotations"][0]["answers"] = [{"answer": said} for said in ("a", "b", "b")]
    put("v2_mscoco_train2014_annotations.json", tree)
    (vqa / "images/train2014/COCO_train2014_000000000025.jpg").unlink()
    imported = import_vqav2(vqa, tmp_path / "out", processes=0)
    (sample,) = examine(tmp_path / "out")["train"].values()
    assert [question["answer"] for question in sample.metadata()["qa"]] == ["b"]  # the most common
    reasons = {skip.source: skip.reason for skip in imported.skipped}
    assert reasons["train2014/COCO_train2014_000000000025.jpg"] == "the image file is missing"  # once, for two
    assert "has no answer in v2_mscoco_train2014_annotations.json" in reasons["question 9001"]
    assert len(imported.skipped) == 4


def test_damaged_files_are_one_sentence(vqa, put, tmp_path):
    put("v2_mscoco_train2014_annotations.json", '{"annotations": 5}')
    with pytest.raises(DataError, match="'annotations' is a number, where a list should be"):
        import_vqav2(vqa, tmp_path / "out")
    (vqa / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(FileNotFoundError, match="with the answers to v2_OpenEnded"):
        import_vqav2(vqa, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_row_costs_itself_and_is_told(vqa, put, tmp_path, examine):
    tree = answers("train2014", [9000, 9001, 9002, 25000])
    tree["annotations"][0]["answers"] = ["net"]
    tree["annotations"][1]["answers"] = []
    tree["annotations"] += [None, {"question_id": None}]
    put("v2_mscoco_train2014_annotations.json", tree)
    asked = questions("train2014", [9000, 9001, 9002, 25000])
    asked["questions"][3]["question"] = None
    put("v2_OpenEndedQuestions_mscoco_train2014_questions.json", asked)
    imported = import_vqav2(vqa, tmp_path / "out", processes=0)
    (sample,) = examine(tmp_path / "out")["train"].values()
    assert [each["id"] for each in sample.metadata()["qa"]] == [9002]
    reasons = {skip.source.partition(", ")[2]: skip.reason for skip in imported.skipped}
    assert reasons["annotations[0], answers[0]"] == "is a text where an object should be"
    assert reasons["annotations[1]"] == "has no answer"
    assert reasons["annotations[4]"].startswith("is null")
    assert reasons["annotations[5]"].startswith("'question_id' is null")
    assert reasons["questions[3]"].startswith("'question' is null")
