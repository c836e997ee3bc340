"""Reading annotation files: large JSON bit by bit, and tables."""

import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers import annotations
from data_pipeline.importers.annotations import clean, json_lines, json_members, lines_of, need, read_json, rows


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_members_come_out_wherever_the_chunks_end(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    tree = {"a": {"x": [1, 2, {"y": "}, {"}]}, 'b"é': "text", "c": 123456, "d": None, "e": [], "f": -1.5e10}
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(f"\n {json.dumps(tree, indent=indent)}\n")
        assert list(json_members(tmp_path / "x.json")) == list(tree.items())
    (tmp_path / "x.json").write_text("{ }")
    assert list(json_members(tmp_path / "x.json")) == []


@pytest.mark.parametrize("text", ["", "{", '{"a"', '{"a": 1', '{"a": {"b": 1}, "c": [1, ', '{"a" 1}', "{1: 2}", "[]"])
def test_damage_is_found_wherever_it_is(tmp_path, monkeypatch, text):
    monkeypatch.setattr(annotations, "CHUNK", 3)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json (is damaged|does not begin)"):
        list(json_members(tmp_path / "x.json"))


def test_damage_at_the_front_is_told_before_all_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK", 10)
    monkeypatch.setattr(annotations, "LONGEST_MEMBER", 100)
    (tmp_path / "x.json").write_text('{"a": nonsense' + "x" * 200 + "\xff")
    with pytest.raises(DataError, match="damaged"):
        list(json_members(tmp_path / "x.json"))


def test_lines_have_numbers_and_may_be_blank(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": 2}')
    assert [(where.rpartition(" ")[2], tree) for where, tree in json_lines(path)] == [("1", {"a": 1}), ("3", {"a": 2})]
    path.write_text('{"a": 1}\n5\n')
    with pytest.raises(DataError, match="line 2: holds a number where an object should be"):
        list(json_lines(path))
    path.write_bytes(b'{"a": 1}\n\xff\n')
    with pytest.raises(DataError, match="is not UTF-8"):
        list(json_lines(path))


def test_a_bad_line_is_handed_on_with_its_number_and_the_next_is_read(tmp_path):
    path = tmp_path / "x.jsonl"
    bad = {2: '{"a": 1', 3: "[]", 4: "[" * 100_000, 5: '{"a": ' + "1" * 5000 + "}", 6: '{"a": 1, "a": 2}'}
    path.write_text("\n".join(['{"a": "one\u2028\x85 line"}', *bad.values(), '{"a": 2}\r\n']), encoding="utf-8")
    told = []
    read = [tree["a"] for _, tree in json_lines(path, lambda *skip: told.append(skip))]
    assert read == ["one\u2028\x85 line", 2]
    assert [where.rpartition(" ")[2] for where, _ in told] == [str(number) for number in bad]
    words = (
        "Expecting ',' delimiter at character 8)",
        "holds a list",
        "nested too deep",
        "more digits",
        "'a' stands twice",
    )
    assert all(word in reason for word, (_, reason) in zip(words, told, strict=True))
    assert all("sys.set_int_max_str_digits" not in reason for _, reason in told)


def test_lines_end_where_lines_end():
    assert lines_of("a\u2028b\x85c\vd\fe\x1cf\ng\r\nh\ri\n\n") == ["a\u2028b\x85c\vd\fe\x1cf", "g", "h", "i", "", ""]


def test_tables(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('\ufeffid,caption\n1,"a, ""b"""\n2\n', encoding="utf-8")
    assert [row for _, row in rows(path, ["id"])] == [{"id": "1", "caption": 'a, "b"'}, {"id": "2", "caption": ""}]
    path.write_text('id\tcaption\n1\t"open\n2\tx\n')
    assert [row["caption"] for _, row in rows(path, ["caption"], delimiter="\t", quoted=False)] == ['"open', "x"]
    for text, words in (("", "columns of an empty file"), ("a,b\n", "'a', 'b', and lacks 'caption'")):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            list(rows(path, ["caption"]))
    path.write_text("caption\n" + "x" * (annotations.LONGEST_VALUE + 1))
    with pytest.raises(DataError, match="after line 1 is damaged: field larger than"):
        list(rows(path, ["caption"]))
    path.write_bytes(b"caption\n\xff\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        list(rows(path, ["caption"]))


def test_a_table_that_would_lose_text_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('id,caption\n1,"two\nlines"\n2,"a cat\n3,a dog\n4,a cow\n')
    with pytest.raises(DataError, match=r"x\.csv after line 3 is damaged: a quote that opens there is never closed"):
        list(rows(path, ["caption"]))
    path.write_text('id,caption\n1,"a "small" cat"\n')
    with pytest.raises(DataError, match=r"after line 1 is damaged: a value goes on after its closing quote"):
        list(rows(path, ["caption"]))
    path.write_text("id,caption\n1,a cat,\n2,a cat, asleep\n")
    read = rows(path, ["caption"])
    assert next(read)[1] == {"id": "1", "caption": "a cat"}
    with pytest.raises(DataError, match=r"x\.csv line 3: has 3 cells, where the header has 2"):
        next(read)
    told = []
    assert [row["id"] for _, row in rows(path, ["id"], lambda *skip: told.append(skip))] == ["1"]
    assert [(where.rpartition(" ")[2], reason[:11]) for where, reason in told] == [("3", "has 3 cells")]
    path.write_text("id\tcaption\n1\ta\tb\n")
    with pytest.raises(DataError, match=r"line 2: has 3 cells"):
        list(rows(path, ["caption"], delimiter="\t", quoted=False))


def test_values_are_of_their_kind():
    record = {"a": 1, "b": True, "c": None, "d": 1.5}
    assert need(record, "a", int, "x") == need(record, "a", float, "x") == 1
    assert need(record, "d", float, "x") == 1.5
    for name, kind in (("b", int), ("c", str), ("d", int), ("e", dict), ("b", float)):
        with pytest.raises(DataError, match=f"^x: '{name}' is "):
            need(record, name, kind, "x")


def test_half_characters_and_no_object(tmp_path):
    assert clean(" a\ud800b ") == "a?b"
    (tmp_path / "x.json").write_text("1" * 5000)  # more digits than Python takes
    with pytest.raises(DataError, match="is not JSON"):
        read_json(tmp_path / "x.json")


def test_a_quote_that_swallows_rows_is_refused(tmp_path):
    header = "file_name,caption_1,caption_2"
    (tmp_path / "x.csv").write_text(header + '\na.wav,"open,two\nb.wav,three,four"\nc.wav,five,six\n')
    with pytest.raises(DataError, match=r"x\.csv line 3: a quote closes there .*'b\.wav,three,four'"):
        list(rows(tmp_path / "x.csv", ["file_name", "caption_1"]))
    (tmp_path / "y.csv").write_text("id,start,caption\n" + '1,0,"open\n2,5,closed"\n')
    with pytest.raises(DataError, match=r"y\.csv line 3: a quote"):
        list(rows(tmp_path / "y.csv", ["id", "caption"]))
    (tmp_path / "z.csv").write_text(header + '\na.wav,"one,\n two, three",x\n')
    assert [row["caption_2"] for _, row in rows(tmp_path / "z.csv", ["file_name"])] == ["x"]


def test_two_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="2 columns called 'a'"):
        list(rows(tmp_path / "x.csv", ["a", "b"]))
