"""Tables of scores: thresholds, top shares and pseudo-labels, from JSON lines and from Parquet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.filters import Signatures, parse_steps, run_filters
from data_pipeline.filters.scores import TopScores, read_column
from data_pipeline.sample import Sample

WriteSet = Callable[..., Path]
ReadAll = Callable[[Path], list[Sample]]
LABELS = ("cat", "dog")
ROWS = [
    {"key": f"s{row}", "similarity": row / 10, "uncertainty": row * 7 % 10, "label": LABELS[row % 2]}
    for row in range(10)
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(params=["scores.jsonl", "scores.parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow.parquet")
    return write_table(tmp_path / request.param, ROWS)


@pytest.fixture
def source(captioned: Callable[..., Sample], write_set: WriteSet) -> Path:
    return write_set("in", [captioned(f"s{number}", f"caption {number}", extra=[number]) for number in range(12)])


def kept(read_all: ReadAll, folder: Path) -> list[int]:
    return [int(sample.key[1:]) for sample in read_all(folder)]


@pytest.mark.parametrize(
    ("words", "numbers", "reasons"),
    [
        ("min=0.4", [4, 5, 6, 7, 8, 9], {"similarity below 0.4": 4, "not in the table of scores": 2}),
        ("min=0.2,missing=keep", [*range(2, 12)], {"similarity below 0.2": 2}),
        ("min=0.2,max=0.5,missing=keep", [2, 3, 4, 5, 10, 11], {"similarity above 0.5": 4, "similarity below 0.2": 2}),
        ("max=0,missing=keep", [0, 10, 11], {"similarity above 0": 9}),
    ],
)  # fmt: skip
def test_thresholds(
    source: Path,
    table: Path,
    tmp_path: Path,
    read_all: ReadAll,
    words: str,
    numbers: list[int],
    reasons: dict[str, int],
) -> None:
    steps = parse_steps([f"scores:table={table},column=similarity,{words}"])
    report = run_filters(source, tmp_path / "out", steps, processes=1)
    assert kept(read_all, tmp_path / "out") == numbers
    assert report.steps[0].reasons == reasons
    assert report.steps[0].options["table_sha256"]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("share=0.3", [1, 4, 7]),  # 7, 8, 9
        ("share=0.21,lowest=true", [0, 3, 6]),  # 0, 1, 2: a share is rounded up
        ("share=0.3,missing=keep", [1, 4, 7, 10, 11]),
        ("share=1", list(range(10))),
    ],
)
def test_top_shares(
    source: Path, table: Path, tmp_path: Path, read_all: ReadAll, words: str, numbers: list[int]
) -> None:
    steps = parse_steps([f"top-scores:table={table},column=uncertainty,{words}"])
    run_filters(source, tmp_path / "out", steps, processes=1)
    assert kept(read_all, tmp_path / "out") == numbers


def test_a_share_is_of_what_is_left_and_the_earlier_of_equals_stays(
    source: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    rows = [{"key": f"s{number}", "score": 1 if number < 6 else 5} for number in range(12)]
    table = write_table(tmp_path / "t.jsonl", rows)
    steps = parse_steps([f"scores:table={table},max=2", f"top-scores:table={table},share=0.5"])
    report = run_filters(source, tmp_path / "out", steps, processes=1)
    assert kept(read_all, tmp_path / "out") == [0, 1, 2]
    assert report.steps[1].reasons == {"score not among the highest 50.00%": 3}


def test_of_many_equal_scores_the_first_stay(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"key": "a", "score": 1}])
    scores = [row * 7 % 3 for row in range(500)]
    rows = np.frombuffer(np.array(scores, np.float64).tobytes(), np.uint8).reshape(500, 8)
    for lowest in (False, True):
        (removed,) = TopScores(table, 0.5, lowest=lowest).decide(Signatures(rows, str), None)
        ranked = sorted(range(500), key=lambda row: (scores[row] if lowest else -scores[row], row))
        assert removed.rows.tolist() == sorted(ranked[250:])


def test_pseudo_labels_are_given_where_the_model_is_sure_and_there_is_no_label(
    captioned: Callable[..., Sample], write_set: WriteSet, table: Path, tmp_path: Path, read_all: ReadAll
) -> None:
    samples = [captioned(f"s{number}", f"caption {number}", provenance={"id": number}) for number in range(7, 12)]
    samples.append(captioned("s5", "mine", label="horse"))
    samples.append(Sample("s9-not", {"txt": b"no json"}))
    folder = write_set("in", samples)
    step = f"pseudo-labels:table={table},column=similarity,min=0.8"
    report = run_filters(folder, tmp_path / "out", parse_steps([step]), processes=1)
    found = {sample.key: sample for sample in read_all(tmp_path / "out")}
    assert {key: sample.label() for key, sample in found.items()} == {
        "s7": None, "s8": "cat", "s9": "dog", "s10": None, "s11": None, "s5": "horse", "s9-not": None,
    }  # fmt: skip
    assert found["s9"].metadata() == {
        "captions": ["caption 9"],
        "provenance": {"id": 9},
        "label": "dog",
        "pseudo_label": {"confidence": 0.9, "table": table.name},
    }
    assert (report.steps[0].changed, report.steps[0].removed) == (2, 0)
    run_filters(folder, tmp_path / "only", parse_steps([step + ",only=true"]), processes=1)
    assert [sample.key for sample in read_all(tmp_path / "only")] == ["s8", "s9", "s5"]


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        (['{"key": "a", "score": 1}', '{"key": "a", "score": 2}'], DataError, "the key 'a' twice, again at line 2"),
        (['{"key": "a", "score": NaN}'], DataError, "nan as score at line 1"),
        (['{"key": "a", "score": "1"}'], DataError, "'1' as score at line 1"),
        (['{"key": 7, "score": 1}'], DataError, "no text as key at line 1"),
        (['{"key": "a", "score": 1'], DataError, "no table of JSON lines"),
        (["[1]"], DataError, "no object in line 1"),
        (['{"key": "a", "loss": 1}'], ValueError, "no 'score' in any row: its columns are loss"),
        ([], ValueError, "no 'score' in any row"),
    ],
)
def test_a_bad_table_is_refused_before_any_work(
    tmp_path: Path, lines: list[str], error: type[Exception], words: str
) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(error, match=words):
        parse_steps([f"scores:table={tmp_path / 't.jsonl'},min=0"])


def test_missing_tables_columns_and_limits_are_refused(table: Path, tmp_path: Path) -> None:
    for step in ("scores", "top-scores:share=0.1", "pseudo-labels"):
        name, colon, rest = step.partition(":")
        words = f"{name}:table={tmp_path / 'none.jsonl'},min=0".replace("min=0", rest if colon else "min=0")
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
            parse_steps([words])
    with pytest.raises(ValueError, match="its columns are"):
        parse_steps([f"scores:table={table},column=other,min=0"])
    with pytest.raises(ValueError, match="min and max are both missing"):
        parse_steps([f"scores:table={table},column=similarity"])
    with pytest.raises(ValueError, match="share is 0"):
        parse_steps([f"top-scores:table={table},column=similarity,share=0"])
    with pytest.raises(ValueError, match="missing is 'maybe'"):
        parse_steps([f"scores:table={table},column=similarity,min=0,missing=maybe"])


def test_rows_without_the_column_have_no_score(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"key": "a", "score": 1}, {"key": "b"}, {"key": "c", "score": None}])
    assert read_column(table, "score") == {"a": 1.0}


def test_text_that_is_not_utf8_is_one_sentence(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    keys = arrow.array([b"a", b"b", b"caf\xe9"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"key": keys, "score": [0.1, 0.2, 0.3]}), tmp_path / "scores.parquet")
    with pytest.raises(DataError, match=r"scores\.parquet holds text that is not UTF-8 at row 3"):
        read_column(tmp_path / "scores.parquet", "score")
