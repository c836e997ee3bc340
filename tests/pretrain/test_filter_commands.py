"""`weft data filter`: what it prints, one JSON object on stdout, and requests that make no sense."""

import json
from pathlib import Path

import pytest
import typer
from tars import picture
from typer.testing import CliRunner

from data_pipeline import Sample, open_dataset, write_shards
from pretrain.filter_commands import filter_command

app = typer.Typer(pretty_exceptions_enable=False)
app.command("filter")(filter_command)


def run(*words: object, exit_code: int = 0) -> str:
    """Run `weft data filter WORDS` and return its stdout; errors rise, as `pretrain.cli.main` wants them."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The parent of train and test: the first two pictures of train are in test, two captions are bad."""
    captions = ["a dog [bold]", "a cat", "IMG_1234", "two cats by ann@example.org", "DSC 12"]
    for part, numbers in (("test", range(2)), ("train", range(5))):
        samples = [Sample(f"{part}[/red]{i}", {"png": picture(i), "txt": captions[i].encode()}) for i in numbers]
        write_shards(len(samples), samples.__getitem__, tmp_path / "sets" / part, processes=1)
    return tmp_path / "sets"


def test_each_step_says_what_it_removed_and_why(parent: Path, tmp_path: Path) -> None:
    steps = ["--steps", "captions", "--steps", "duplicates:of=bytes", "--steps", "personal-data"]
    told = run(parent / "train", tmp_path / "out", *steps, "--against", parent / "test")
    assert "2 removed: name of a camera's file" in told
    assert "shard-000000.tar train[/red]2: name of a camera's file" in told
    assert "2 removed: same bytes as a sample of the test set" in told
    assert "(as test[/red]0 in shard-000000.tar)" in told
    assert "1 changed: email" in told
    assert f"{tmp_path / 'out'}: 1 of 5 samples kept, 1 of them changed" in told
    assert open_dataset(tmp_path / "out").read(0).fields["txt"] == b"two cats by <email>"


def test_json_is_the_report_that_lies_beside_the_shards(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("- captions: {min_words: 2}\n")
    words = ["--steps", tmp_path / "steps.yaml", "--processes", "2", "--json"]
    tree = json.loads(run(parent / "train", tmp_path / "out", *words))
    assert tree.pop("path") == str(tmp_path / "out")
    assert tree == json.loads((tmp_path / "out" / "filters.json").read_text())
    assert (tree["seen"], tree["kept"], tree["steps"][0]["options"]["min_words"]) == (5, 3, 2)


def test_requests_that_make_no_sense_say_what_would(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no --steps: give one or more of\n  captions: Take out .*\(min_words, "):
        run(parent / "train", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds 2 data sets: give .*train, with --against .*test to keep"):
        run(parent, tmp_path / "out", "--steps", "captions")
    with pytest.raises(FileNotFoundError, match="no data set at"):
        run(tmp_path / "none", tmp_path / "out", "--steps", "captions")
    with pytest.raises(ValueError, match="is there already"):
        run(parent / "train", parent / "test", "--steps", "captions")
    assert not (tmp_path / "out").exists()
