"""`weft data`: exit codes, one JSON object on stdout, and that it tells what the functions below it found."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from tars import picture, tar_of
from typer.main import get_command
from typer.testing import CliRunner

from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.order import Order
from data_pipeline.reader import open_dataset
from data_pipeline.remote import Cache
from pretrain.cli import main, weft
from pretrain.data_commands import data, datasets_in

TINY = [
    *("model.vision={layers: 1, width: 32, image_size: 32}", "model.text={layers: 1, width: 32, vocab_size: 300}"),
    *("model.embed_dim=16", "train.global_batch=4", "train.steps=3", "train.warmup=1", "train.log_every=1"),
    *("data.workers=1", "data.block=2", "data.window=2", "eval.samples=2"),
]


def run(*words: object, exit_code: int = 0) -> str:
    """Run `weft data WORDS` and return its stdout; errors rise, as `pretrain.cli.main` wants them."""
    result = CliRunner().invoke(data, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout


def run_json(*words: object, exit_code: int = 0) -> dict[str, Any]:
    tree = json.loads(run(*words, "--json", exit_code=exit_code))
    assert isinstance(tree, dict)
    return tree


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A parent of train (7 samples in 2 shards) and test (2 samples)."""
    for part, shards in (("train", (4, 3)), ("test", (2,))):
        (tmp_path / "sets" / part).mkdir(parents=True)
        for shard, count in enumerate(shards):
            files = {}
            for i in range(count):
                files |= {f"{part}{shard}-{i}.png": picture(i), f"{part}{shard}-{i}.txt": b"words [bold]"}
            (tmp_path / "sets" / part / f"s{shard}.tar").write_bytes(tar_of(files))
        load_index(tmp_path / "sets" / part)
    return tmp_path / "sets"


@pytest.fixture
def bad(parent: Path) -> Path:
    """The same with a bad picture in test, its index made anew."""
    files = {"ok.png": picture(), "ok.txt": b"fine", "bad[/red].png": b"no picture", "bad[/red].txt": b"caption"}
    (parent / "test" / "s0.tar").write_bytes(tar_of(files))
    (parent / "test" / "index.json").unlink()
    load_index(parent / "test")
    return parent


def test_datasets_in(parent: Path, tmp_path: Path) -> None:
    assert datasets_in(parent / "train") == [parent / "train"]
    assert datasets_in(parent) == [parent / "train", parent / "test"]
    for file in (parent / "train").glob("*.tar"):
        file.unlink()
    assert datasets_in(parent) == [parent / "train", parent / "test"]  # an index without shards is a bad data set
    (parent / "train" / "index.json").unlink()
    assert datasets_in(parent) == [parent / "test"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        datasets_in(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it is a file, not a folder of shards; .*give the folder"):
        datasets_in(parent / "test" / "s0.tar")
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"none in train/ or test/; x\.tar\.gz is compressed"):
        datasets_in(tmp_path)


def test_check_of_good_data(parent: Path) -> None:
    tree = run_json("check", parent)
    assert tree["ok"] is True
    assert [(part["path"], part["samples"], part["shards"]) for part in tree["datasets"]] == [
        (str(parent / "train"), 7, 2), (str(parent / "test"), 2, 1),
    ]  # fmt: skip
    text = run("check", parent / "train")
    assert "good, 7 samples in 2 shards, 0 errors, 0 warnings" in text


def test_check_of_bad_data_leaves_with_1_and_says_where(bad: Path) -> None:
    tree = run_json("check", bad, exit_code=1)
    assert tree["ok"] is False
    assert [part["ok"] for part in tree["datasets"]] == [True, False]
    (problem,) = tree["datasets"][1]["problems"]
    assert (problem["severity"], problem["shard"], problem["key"]) == ("error", "s0.tar", "bad[/red]")
    text = run("check", bad, exit_code=1)
    assert "bad[/red]" in text  # not taken for colour
    assert f"byte {problem['byte']}" in text
    assert "test: bad, 2 samples in 1 shard, 1 error, 0 warnings" in text.replace("\n", "")


def test_check_without_decoding(bad: Path) -> None:
    assert run_json("check", bad, "--no-decode")["ok"] is True


def test_check_lists_all_in_json_and_the_first_ones_in_text(parent: Path) -> None:
    files = {f"k{i}.{kind}": b"no picture" for i in range(60) for kind in ("png", "txt")}
    (parent / "test" / "s0.tar").write_bytes(tar_of(files))
    (parent / "test" / "index.json").unlink()
    tree = run_json("check", parent / "test", exit_code=1)
    assert sum(problem["severity"] == "error" for problem in tree["datasets"][0]["problems"]) == 60
    text = run("check", parent / "test", exit_code=1)
    assert text.count("error s0.tar") == 12
    assert "--json lists all" in text


def test_stats(parent: Path) -> None:
    tree = run_json("stats", parent)
    train, test = tree["datasets"]
    assert (train["path"], train["samples"], train["opened"]) == (str(parent / "train"), 7, 7)
    assert train["image_sizes"] == {"13 x 7": 7}
    assert train["fingerprint"] == load_index(parent / "train").fingerprint
    assert test["modalities"] == {"image": 2, "text": 2}
    assert run_json("stats", parent / "train", "--samples", 3)["datasets"][0]["opened"] == 3
    text = run("stats", parent)
    assert "7 in 2 shards" in text
    assert "2 in 1 shard" in text


@pytest.fixture
def parquet(parent: Path, tmp_path: Path) -> Path:
    """A parent of train (7 rows in 2 files) and test (2 rows): the samples of `parent`."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for part in ("train", "test"):
        dataset = open_dataset(parent / part)
        (tmp_path / "parquet" / part).mkdir(parents=True)
        for shard, first in enumerate(range(0, len(dataset), 4)):
            rows = [dataset.read(number).fields for number in range(first, min(first + 4, len(dataset)))]
            table = pa.table({"png": [row["png"] for row in rows], "txt": [row["txt"].decode() for row in rows]})
            pq.write_table(table, tmp_path / "parquet" / part / f"s{shard}.parquet", row_group_size=2)
    return tmp_path / "parquet"


def test_parquet_is_counted_shown_and_ordered_as_tars_are(parent: Path, parquet: Path, tmp_path: Path) -> None:
    for mine, theirs in zip(run_json("stats", parquet)["datasets"], run_json("stats", parent)["datasets"], strict=True):
        assert mine["path"] == theirs["path"].replace(str(parent), str(parquet))
        for name in ("samples", "shards", "opened", "unreadable", "modalities", "image_sizes", "caption_words"):
            assert mine[name] == theirs[name]
    assert "7 in 2 shards" in run("stats", parquet)
    one = parquet / "train" / "s1.parquet"
    assert run_json("stats", one)["datasets"][0]["samples"] == 3
    assert run_json("stats", parquet / "train" / "s*.parquet")["datasets"][0]["samples"] == 7
    rows = run_json("order", parquet / "train", "--seed", 5, "--count", 7)["rows"]
    expected = run_json("order", parent / "train", "--seed", 5, "--count", 7)["rows"]
    for row, other in zip(rows, expected, strict=True):
        assert {**row, "key": "", "shard": ""} == {**other, "key": "", "shard": ""}
        assert (row["shard"], row["key"]) == (
            f"s{row['sample'] // 4}.parquet",
            f"s{row['sample'] // 4}/{row['offset']}",
        )
    run("preview", one)
    assert (parquet / "train" / "preview.html").read_text().count("<article>") == 3


def test_parquet_is_checked_as_tars_are(parquet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(parquet), "--processes", "1", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [(each["ok"], each["samples"]) for each in tree["datasets"]] == [(True, 7), (True, 2)]
    broken = parquet / "train" / "s0.parquet"
    broken.write_bytes(broken.read_bytes()[:-9])
    assert main(["data", "check", str(parquet / "train"), "--processes", "1"]) == 1
    assert "train: bad, 3 samples in 2 shards, 1 error" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("name", ["*.tar", "{000..010}.tar", "s0.tar", "s[01].tar"])
@pytest.mark.parametrize("command", ["check", "stats", "order", "preview"])
def test_patterns_of_tars_get_a_hint(parent: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", command, str(parent / "train" / name)]) == 2
    assert f"give the folder, {parent / 'train'}, " in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(parent))
    assert run_json("order", "~/train", "--count", 2)["rows"]


def test_no_command_prints_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "a\x1b[2J\nb\r\u202e\x07"
    files = {f"{key}.png": b"no", f"{key}.json": json.dumps({"label": "l\x1b[1m", "captions": [""]}).encode()}
    (tmp_path / "s\x1b.tar").write_bytes(tar_of({**files, "good.png": picture(), "good.txt": b"x"}))
    (tmp_path / "t\x1b.tgz").write_bytes(b"x")
    for command in ("check", "stats", "order"):
        main(["data", command, str(tmp_path)])
        said = capsys.readouterr()
        assert all(each.isprintable() for line in (said.out + said.err).splitlines() for each in line), command
    (tmp_path / "s\x1b.tar").write_bytes(b"no tar")
    assert main(["data", "stats", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip().isprintable()


@pytest.mark.parametrize("command", ["stats", "check", "preview", "order"])
def test_a_folder_whose_name_is_no_text_is_told_all_the_same(parent: Path, tmp_path: Path, command: str) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.rename(parent / "train", folder)
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "data", command, folder], capture_output=True, env=strict
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert command == "order" or b"caf\\udce9" in done.stdout


def test_a_sentence_with_separators_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(tmp_path / "a\u2028b\x85c\rd")]) == 2
    assert "a\\u2028b\\x85c\\rd: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(["data", command, ""] for command in ("stats", "check", "preview", "order", "synth")),
        *(["data", command, *paths] for command in ("bake", "filter") for paths in (["", "x"], ["x", ""])),
        *(["data", "score", *paths] for paths in (["", "x", "x"], ["x", "", "x"], ["x", "x", ""])),
        ["data", "score", "x", "x", "x", "--classes", ""],
        ["data", "filter", "x", "x", "--against="],
        ["data", "preview", "x", "--out="],
        *(["data", "import", each, *paths] for each in ("folder", "table", "coco") for paths in (["", "x"], ["x", ""])),
        ["data", "import", "coco", "x", "x", "--media", " "],
        ["data", "import", "tuxpaint", ""],
        ["data", "import", "tuxpaint", "x", "--package="],
        *([*command, ""] for command in (["eval"], ["report"], ["checkpoint", "show"], ["checkpoint", "verify"])),
        ["eval", "x", "--data="],
        ["report", "x", "--out="],
        ["report", "--compare", "x", ""],
        ["bench", "kernels", "--out="],
    ],
)
def test_an_empty_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "it is empty, as a shell variable is that was never set" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_every_path_of_a_command_line_is_read_by_what_refuses_an_empty_one() -> None:
    def commands_in(command: Any) -> Iterator[Any]:
        yield command
        for below in getattr(command, "commands", {}).values():
            yield from commands_in(below)

    unread = []
    for command in commands_in(get_command(weft)):
        for name, hint in get_type_hints(command.callback, include_extras=True).items() if command.callback else ():
            kind, *given = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if (kind in (Path, Path | None) or name == "path") and not any(each.parser for each in given):
                unread.append(f"{command.name} {name}")
    assert not unread, "these lack parser=path_given"


def test_what_check_cannot_check_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for path, sentence in (
        ("https://example.org/set", "https://example.org/set is a URL, and check reads every byte of a folder"),
    ):
        assert main(["data", "check", str(path)]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.splitlines()) == 1


def test_stats_of_a_url_are_those_of_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", "nonsense://bucket/set"]) == 2
    assert "nonsense://bucket/set cannot be read" in capsys.readouterr().err, "with both of its slashes"


@pytest.mark.slow
def test_a_run_on_parquet_is_the_run_on_tars(parent: Path, parquet: Path, tmp_path: Path) -> None:
    losses = []
    for number, data_path in enumerate((parent, parquet)):
        words = [
            f"data.train={data_path / 'train'}",
            f"data.test={data_path / 'test'}",
            f"run.dir={tmp_path / str(number)}",
        ]
        command = [sys.executable, "-m", "pretrain.cli", "train", "quickstart", *words, *TINY]
        subprocess.run(command, check=True, capture_output=True, timeout=900)
        lines = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_preview_beside_the_shards_or_where_it_is_told(parent: Path, tmp_path: Path) -> None:
    run("preview", parent)
    assert "train0-0" in (parent / "train" / "preview.html").read_text()
    assert "test0-0" in (parent / "test" / "preview.html").read_text()
    tree = run_json("preview", parent, "--out", tmp_path / "new" / "p.html", "--count", 3)
    files = [Path(part["file"]) for part in tree["datasets"]]
    assert files == [tmp_path / "new" / "p-train.html", tmp_path / "new" / "p-test.html"]
    assert [file.read_text().count("<article>") for file in files] == [3, 2]
    run("preview", parent / "test", "--out", tmp_path / "one.html")
    assert (tmp_path / "one.html").is_file()
    assert run_json("check", parent)["ok"]  # a sheet beside the shards is not in their way


def test_order_prints_what_a_run_reads(parent: Path) -> None:
    tree = run_json("order", parent / "train", "--seed", 5, "--epoch", 2, "--start", 3, "--count", 6)
    assert (tree["samples"], tree["seed"], tree["shuffle"]) == (7, 5, True)
    rows = tree["rows"]
    assert [row["position"] for row in rows] == list(range(17, 23))
    assert [row["epoch"] for row in rows] == [2, 2, 2, 2, 3, 3]
    assert [row["sample"] for row in rows] == Order(7, 5).sample_ids(np.arange(17, 23)).tolist()
    keys = [f"train0-{i}" for i in range(4)] + [f"train1-{i}" for i in range(3)]
    for row in rows:
        assert row["key"] == keys[row["sample"]]
        assert (row["shard"], row["offset"]) == (("s0.tar", "s1.tar")[row["sample"] > 3], row["sample"] % 4)
    text = run("order", parent / "train", "--seed", 5, "--epoch", 2, "--start", 3, "--count", 6)
    assert text.split("\n")[0].split() == list(rows[0])
    assert [line.split()[-1] for line in text.splitlines()[1:]] == [row["key"] for row in rows]


def test_order_without_shuffling(parent: Path) -> None:
    rows = run_json("order", parent / "train", "--no-shuffle", "--count", 8)["rows"]
    assert [row["sample"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 0]


def test_order_of_a_url_is_that_of_the_folder(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_dataset, "__defaults__", (Cache(tmp_path / "cache"),))
    url = f"file://{parent / 'train'}"
    tree = run_json("order", url)
    assert tree.pop("path") == url
    assert tree == {name: value for name, value in run_json("order", parent / "train").items() if name != "path"}
    assert main(["data", "order", "nonsense://bucket/set"]) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [(["preview"], "`weft data stats"), (["filter", "--steps", "captions", "out"], "copy it to this")],
)
def test_a_url_is_refused_in_a_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", words[0], "s3://bucket/set", *words[3:], *words[1:3]]) == 2
    said = capsys.readouterr().err
    assert "s3://bucket/set is a URL, and " in said
    assert says in said
    assert len(said.splitlines()) == 1


def test_order_beyond_the_last_position(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = (1 << 62) - 1
    words = ["order", parent / "train", "--epoch", last // 7, "--start", last % 7, "--count"]
    assert run_json(*words, 1)["rows"][0]["position"] == last
    for epoch, count in ((last // 7, 8), (10**18 - 1, 1), (10**30, 1)):
        assert main(["data", "order", str(parent / "train"), "--epoch", str(epoch), "--count", str(count)]) == 2
        said = capsys.readouterr().err
        assert f"--epoch {epoch} with --count {count} goes to position" in said
        assert "positions stay below 2^62" in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("address", ["a..b:6379", f"{'a' * 70}.example:6379", "127.0.0.1:99999999999999999999"])
def test_no_ray_at_an_address_that_is_none(address: str) -> None:
    pytest.importorskip("ray")
    from data_pipeline.ray_cluster import connect

    with pytest.raises(DataError, match=rf"there is no Ray cluster at {address} \(.+\)"):
        connect(address)


def test_no_ray_and_no_word_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from data_pipeline.ray_cluster import connect

    def refuse(**settings: Any) -> None:
        raise ConnectionError

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(DataError, match=r"there is no Ray cluster at auto \(ConnectionError\)"):
        connect("auto")


def test_a_ray_of_its_own_that_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from data_pipeline.ray_cluster import connect, disconnect

    def come_late(**settings: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", come_late)
    with pytest.raises(DataError, match=r"Ray did not start on this machine \(The current node timed out"):
        connect("local")
    disconnect()


def test_order_is_of_one_data_set_and_within_its_epoch(parent: Path) -> None:
    with pytest.raises(ValueError, match=r"each with its own order: give .*train"):
        run("order", parent)
    with pytest.raises(ValueError, match=r"--start is 7, but an epoch of .* has places 0 to 6"):
        run("order", parent / "train", "--start", 7)
    assert run_json("order", parent / "train", "--start", 6, "--count", 1)["rows"][0]["position"] == 6


def test_bad_data_rises_where_there_is_no_result(parent: Path) -> None:
    (parent / "train" / "s0.tar").write_bytes(b"x" * 100)
    for command in ("stats", "preview", "order"):
        with pytest.raises(DataError, match=r"s0\.tar has 100 bytes"):
            run(command, parent / "train")
    assert run_json("check", parent / "train", exit_code=1)["ok"] is False


@pytest.mark.parametrize("command", ["check", "stats", "preview", "order"])
def test_a_missing_folder_rises(tmp_path: Path, command: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere"):
        run(command, tmp_path / "nowhere")


@pytest.mark.parametrize(
    "words",
    [
        ["check"],
        ["check", "x", "--surprise"],
        ["order", "x", "--epoch", "-1"],
        ["order", "x", "--count", "0"],
        ["preview", "x", "--count", "none"],
        ["import", "nothing", "x"],
        ["import", "folder", "x"],
        ["import", "folder", "x", "y", "--test-share", "1.5"],
        ["synth", "x", "--train", "0"],
        ["nonsense"],
    ],
)
def test_wrong_requests_leave_with_2(words: list[str]) -> None:
    run(*words, exit_code=2)


def test_synth_writes_train_and_test(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    words = ["--train", 5, "--test", 3, "--seed", 4, "--size", 32, "--no-sound", "--processes", 1]
    tree = run_json("synth", out, *words)
    assert (tree["train"]["samples"], tree["test"]["samples"]) == (5, 3)
    assert tree["train"]["fingerprint"] == load_index(out / "train").fingerprint
    assert tree["train"]["path"] == str(out / "train")
    stats = run_json("stats", out)["datasets"]
    assert [part["image_sizes"] for part in stats] == [{"32 x 32": 5}, {"32 x 32": 3}]
    assert stats[0]["modalities"].get("audio", 0) == 0
    assert run_json("check", out)["ok"]
    text = run("synth", tmp_path / "again", *words)
    assert "5 samples in 1 shard" in text
    assert load_index(tmp_path / "again" / "test").fingerprint == tree["test"]["fingerprint"]
    with pytest.raises(ValueError, match="there already"):
        run("synth", out, *words)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"p{number}.png").write_bytes(picture(number))
        (folder / f"p{number}.txt").write_text(f"picture number {number}")
    return folder


def test_import_folder(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 12)
    (source / "broken.jpg").write_bytes(b"no picture")
    (source / "broken.txt").write_text("a broken one")
    words = ["--test-share", 0.25, "--processes", 1]
    tree = run_json("import", "folder", source, tmp_path / "out", *words)
    assert tree["train"]["samples"] + tree["test"]["samples"] == 12
    skipped = tree["train"]["skipped"] + tree["test"]["skipped"]
    assert len(skipped) == 1
    assert "broken.jpg" in skipped[0]["source"]
    assert run_json("check", tmp_path / "out")["ok"]
    text = run("import", "folder", source, tmp_path / "text", *words)
    assert "skipped 1" in text
    assert "broken.jpg" in text


def test_import_without_a_test_set(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 4)
    tree = run_json("import", "folder", source, tmp_path / "out", "--test-share", 0, "--processes", 1)
    assert tree["train"]["samples"] == 4
    assert tree["test"] is None


def test_import_table(tmp_path: Path) -> None:
    pictures(tmp_path / "in", 6)
    rows = [f"in/p{number}.png,the words of {number}" for number in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(["where,said", *rows]))
    words = ["--image-column", "where", "--caption-column", "said", "--test-share", 0.5, "--processes", 1]
    tree = run_json("import", "table", tmp_path / "list.csv", tmp_path / "out", *words)
    assert tree["train"]["samples"] + tree["test"]["samples"] == 6
    with pytest.raises(ValueError, match="nothing_like_it"):
        run("import", "table", tmp_path / "list.csv", tmp_path / "x", "--image-column", "nothing_like_it")


def test_import_tuxpaint_hands_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself is 161 MB; that the importer reads it is tested with the importer."""
    import data_pipeline.importers.tuxpaint as tuxpaint
    from data_pipeline.importers.split import Imported
    from data_pipeline.sample import Sample, Skipped
    from data_pipeline.shards import Written, write_shards

    called: dict[str, Any] = {}

    def import_tuxpaint(out: Path, **options: Any) -> Imported:
        called.update(options, out=out)
        written = write_shards(1, lambda number: Sample("k", {"txt": b"x"}), out / "train", processes=1)
        return Imported(Written(written.index, (Skipped("a.svg", "drawn in [vectors]"),) * 30), None)

    monkeypatch.setattr(tuxpaint, "import_tuxpaint", import_tuxpaint)
    package = tmp_path / "stamps.deb"
    words = ["--language", "de", "--package", package, "--no-sound", "--seed", 3]
    tree = run_json("import", "tuxpaint", tmp_path / "out", *words)
    assert (called["out"], called["package"]) == (tmp_path / "out", package)
    assert (called["language"], called["seed"], called["sound"], called["test_share"]) == ("de", 3, False, 0.2)
    assert (tree["train"]["samples"], len(tree["train"]["skipped"])) == (1, 30)
    text = run("import", "tuxpaint", tmp_path / "text", *words)
    assert text.count("a.svg: drawn in [vectors]") == 12
    assert "and 18 more" in text


def coco(folder: Path) -> Path:
    """Two images of train and one of val, in COCO's form."""
    (folder / "annotations").mkdir(parents=True)
    for part, numbers in (("train2017", (1, 2)), ("val2017", (3,))):
        (folder / part).mkdir()
        images = [{"id": number, "file_name": f"{number:012d}.jpg", "license": 1} for number in numbers]
        for image in images:
            (folder / part / image["file_name"]).write_bytes(picture(image["id"], kind="JPEG"))
        captions = [{"image_id": image["id"], "caption": f"{image['id']} {n}"} for n in range(5) for image in images]
        images.append({"id": 99, "file_name": "gone[/red].jpg", "license": 1})
        tree = {"images": images, "annotations": captions, "licenses": [{"id": 1, "name": "CC BY"}]}
        (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(tree))
    return folder


def test_import_of_a_published_set(tmp_path: Path) -> None:
    source, out = coco(tmp_path / "in"), tmp_path / "out"
    words = ["import", "coco", source, out, "--licence", "terms", "--processes", 1]
    tree = run_json(*words)
    assert (tree["train"]["samples"], tree["test"]["samples"], tree["already"]) == (2, 1, False)
    assert tree["train"]["reasons"] == {"the image file is missing": 2}
    assert [skip["source"] for skip in tree["train"]["skipped"]] == [
        f"{s}2017/gone[/red].jpg" for s in ("train", "val")
    ]
    assert run_json("check", out)["ok"]
    again = run_json(*words)
    assert again == {**tree, "already": True}
    text = run(*words)
    assert "skipped 2" in text
    assert f"{out} was there already, from the same source: nothing was changed" in text
    with pytest.raises(ValueError, match="there already: give another folder"):
        run(*words, "--seed", 1)
    with pytest.raises(ValueError, match="there already: give another folder"):
        run("import", "coco", coco(tmp_path / "other"), out)


def test_a_published_set_of_three_parts_or_another_split(tmp_path: Path) -> None:
    images = []
    (tmp_path / "in" / "flickr30k-images").mkdir(parents=True)
    for number, split in enumerate(["train", "val", "test", "train"]):
        (tmp_path / "in" / "flickr30k-images" / f"{number}.jpg").write_bytes(picture(number, kind="JPEG"))
        sentence = {"raw": f"picture {number}"}
        images.append({"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": [sentence]})
    (tmp_path / "in" / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    tree = run_json("import", "flickr30k", tmp_path / "in", tmp_path / "out", "--processes", 1)
    assert {part: tree[part]["samples"] for part in ("train", "val", "test")} == {"train": 2, "val": 1, "test": 1}
    parts = [part["path"] for part in run_json("check", tmp_path / "out")["datasets"]]
    assert parts == [str(tmp_path / "out" / part) for part in ("train", "val", "test")]
    media = ["--media", tmp_path / "in" / "flickr30k-images", "--test-share", 0.5, "--processes", 1]
    tree = run_json("import", "flickr30k", tmp_path / "in" / "dataset_flickr30k.json", tmp_path / "half", *media)
    assert (tree["train"]["samples"], tree["test"]["samples"]) == (2, 2)
    assert "val" not in tree


def test_every_published_set_has_a_command_and_a_function() -> None:
    """The command finds the function by name, so that a slip would show at the user's first import only."""
    from importlib import import_module

    from pretrain.import_commands import PUBLISHED

    for name in PUBLISHED:
        assert callable(getattr(import_module(f"data_pipeline.importers.{name}"), f"import_{name}"))
        assert "--media" in run("import", name, "--help")


def test_importing_the_commands_loads_nothing_heavy() -> None:
    code = "import sys, pretrain.data_commands; print({'torch', 'numpy', 'data_pipeline'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == "set()"


def test_a_process_prints_one_json_object_and_nothing_else(bad: Path) -> None:
    code = "from pretrain.data_commands import data; data()"
    command = [sys.executable, "-c", code, "check", str(bad), "--json"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert json.loads(found.stdout)["ok"] is False
    assert found.stderr == ""


def test_bake_writes_each_part_and_says_what_it_skipped(bad: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked"
    tree = run_json("bake", bad, out, "--short-side", 5, "--processes", 1)
    assert [Path(each["path"]).name for each in tree["datasets"]] == ["train", "test"]
    assert [each["samples"] for each in tree["datasets"]] == [7, 1]
    (skipped,) = tree["datasets"][1]["skipped"]
    assert skipped["source"] == "bad[/red]"
    assert "not a JPEG, PNG or WebP" in skipped["reason"]
    assert open_dataset(out / "train").read(0).metadata()["baked"]["short_side"] == 5
    assert "skipped 1" in run("bake", bad / "test", tmp_path / "one", "--short-side", 4)
    assert (tmp_path / "one" / "index.json").is_file()


def test_training_refuses_what_would_enlarge_baked_images(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):
        run("bake", parent / part, tmp_path / "baked" / part, "--short-side", 5, "--processes", 1)
    for part, way in (("train", f"data.test={parent / 'test'}"), ("test", f"data.train={parent / 'train'}")):
        baked = f"data.{part}={tmp_path / 'baked' / part}"
        assert main(["train", "quickstart", baked, way, f"run.dir={tmp_path / 'run'}", *TINY]) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path / 'baked' / part} was baked to a short side of 5, but model.vision.image_size=32" in told
        assert "Traceback" not in told
    assert not (tmp_path / "run").exists()
