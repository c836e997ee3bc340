"""The command line: exit codes, one sentence for a user's mistake, one object for --json, and a quick --help."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import DataError
from data_pipeline.scenes.synth import synthesise
from pretrain.cli import main
from pretrain.config import Recipe, builtin_recipes, load_recipe
from pretrain.errors import RequestError, WeftError

NO_MEMORY = "use a smaller batch or model, or a machine with more memory"
COMMANDS = ["train", "config", "eval", "report", "checkpoint", "checkpoint show", "checkpoint verify", "data", "bench"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    synthesise(folder, train=40, test=20, size=32, sound=False, processes=1)
    return folder


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line that must fail with a code, and returns its one sentence."""
    monkeypatch.delenv("RANK", raising=False)

    def run(code: int, *arguments: str | Path) -> str:
        assert main([str(each) for each in arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == "", "nothing on stdout that a script could take for a result"
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("weft: ")
        return lines[0].removeprefix("weft: ")

    return run


# --- mistakes: one sentence and exit code 2


def test_an_unknown_recipe_names_those_there_are(mistake: Any) -> None:
    for command in ("train", "config"):
        sentence = mistake(2, command, "quikstart")
        assert "'quikstart' is not a recipe" in sentence
        assert all(name in sentence for name in builtin_recipes())


def test_an_unknown_key_names_its_neighbour(mistake: Any) -> None:
    for command in ("train", "config"):
        assert "unknown key 'train.lrr' (did you mean 'train.lr'?)" in mistake(2, command, "quickstart", "train.lrr=1")


def test_a_value_of_the_wrong_type_is_shown(mistake: Any) -> None:
    sentence = mistake(2, "train", "quickstart", "train.steps=many")
    assert "train.steps is 'many'" in sentence
    assert "whole number" in sentence


def test_a_broken_override_is_quoted(mistake: Any) -> None:
    assert "'objectives=[': the value is not YAML" in mistake(2, "train", "quickstart", "objectives=[")
    assert mistake(2, "config", "quickstart", "lr") == "override 'lr' is not of the form key=value"


def test_data_that_is_not_there_is_named(mistake: Any, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    run = f"run.dir={tmp_path / 'run'}"
    assert str(missing) in mistake(2, "train", "quickstart", f"data.train={missing}", run)
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = mistake(2, "train", "quickstart", f"data.train={empty}", run)
    assert str(empty) in sentence
    assert "no .tar file" in sentence
    assert not (tmp_path / "run").exists(), "a request that is refused leaves nothing behind"


def test_test_data_that_is_not_there_is_found_before_training(mistake: Any, data: Path, tmp_path: Path) -> None:
    settings = [f"data.train={data / 'train'}", f"run.dir={tmp_path / 'run'}", "train.global_batch=8"]
    assert "nowhere" in mistake(2, "train", "quickstart", *settings, "data.test=nowhere")
    assert "nowhere.json" in mistake(
        2, "train", "quickstart", *settings, "data.test=null", "data.tokenizer=nowhere.json"
    )
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data_is_refused(mistake: Any, data: Path, tmp_path: Path) -> None:
    settings = [f"data.train={data / 'train'}", f"data.test={data / 'test'}", f"run.dir={tmp_path / 'run'}"]
    sentence = mistake(2, "train", "quickstart", *settings)
    assert "train.global_batch is 64" in sentence
    assert "only 40 samples" in sentence


@pytest.mark.parametrize("ranks", [[], ["--nproc", "3"]])
def test_a_layout_that_cannot_be_right_is_refused_before_any_rank_starts(
    mistake: Any, data: Path, tmp_path: Path, ranks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.launch.launch", lambda *_: pytest.fail("ranks were started"))
    settings = [f"data.train={data / 'train'}", f"run.dir={tmp_path / 'run'}", "train.global_batch=24"]
    sentence = mistake(2, "train", "quickstart", *settings, "layout.tp=2", *ranks)
    assert "layout.tp is 2" in sentence


@pytest.mark.parametrize(
    "command",
    [["eval"], ["checkpoint", "show"], ["checkpoint", "verify"], ["report"]],
    ids=" ".join,
)
def test_no_run_and_no_checkpoint_are_told_apart(mistake: Any, tmp_path: Path, command: list[str]) -> None:
    missing = tmp_path / "missing"
    sentence = mistake(2, *command, missing)
    assert str(missing) in sentence
    assert "no such folder" in sentence
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = mistake(2, *command, empty)
    assert str(empty) in sentence
    assert "no run folder" in sentence or "no checkpoint in" in sentence
    assert list(empty.iterdir()) == []


def test_a_task_that_there_is_none_of_is_refused(mistake: Any, tmp_path: Path) -> None:
    assert (
        mistake(2, "eval", tmp_path, "--task", "guess")
        == "--task is 'guess': use one of all, retrieval, zero_shot, captioning"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nosuch"], ["No such command 'nosuch'", "weft --help"]),
        (["train"], ["RECIPE", "train --help"]),
        (["train", "quickstart", "--nosuch"], ["--nosuch", "train --help"]),
        (["train", "quickstart", "--nproc", "0"], ["--nproc", "greater than or equal to 1"]),
        (["train", "quickstart", "--nproc", "two"], ["--nproc", "integer"]),
        (["eval", "run", "--samples", "1"], ["--samples", "greater than or equal to 2"]),
        (["checkpoint", "nosuch"], ["nosuch", "checkpoint --help"]),
        (["eval", "run", "--data", ""], ["'--data': it is empty, as a shell variable", "eval --help"]),
        (["eval", " "], ["RUN|CHECKPOINT", "it is empty"]),
        (["report", ""], ["RUN", "it is empty"]),
        (["report", "run", "", "--compare"], ["OTHER", "it is empty"]),
        (["report", "run", "--out="], ["--out", "it is empty"]),
        (["checkpoint", "show", ""], ["PATH", "it is empty"]),
        (["checkpoint", "verify", ""], ["PATH", "it is empty"]),
    ],
)
def test_a_command_line_that_does_not_parse(mistake: Any, arguments: list[str], words: list[str]) -> None:
    sentence = mistake(2, *arguments)
    for word in words:
        assert word.lower() in sentence.lower()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "1"}, "weft: "),  # nobody else is there
        ({"RANK": "1", "WORLD_SIZE": "2"}, "weft: rank 1: "),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-2]"}, "weft: rank 3: "),
        ({"RANK": "1", "WORLD_SIZE": "2", "WEFT_LAUNCHER": "1"}, ""),  # our launcher says what a rank left for it
    ],
)
def test_a_rank_says_its_error_where_nobody_says_it_for_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    says: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(says) if says else told == ""
    assert bool(says) == (str(tmp_path) in told)


# --- what goes wrong inside a command


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (WeftError("it is bad"), 1, "it is bad"),
        (RequestError("ask otherwise"), 2, "ask otherwise"),
        (ValueError("not so"), 2, "not so"),
        (DataError("a bad shard"), 1, "a bad shard"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.tar"), 2, "x.tar: no such file or directory"),
        (FileNotFoundError("no data set at x"), 2, "no data set at x"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: permission denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            1,
            "the disk is full (x: no space left on device): make room and give the same command again",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            1,
            "the disk is full (Disk quota exceeded): make room and give the same command again",
        ),
        (MemoryError(), 1, f"the memory is full: {NO_MEMORY}"),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            1,
            f"the memory is full (Cannot allocate memory): {NO_MEMORY}",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, f"the memory is full (CUDA out of memory): {NO_MEMORY}"),
        (
            RuntimeError("CUDA error: out of memory\nx"),
            1,
            f"the memory is full (CUDA error: out of memory): {NO_MEMORY}",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_kind_of_failure_has_its_code_and_sentence(
    mistake: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("pretrain.report.write_report", fail)
    assert mistake(code, "report", "run") == sentence


def test_ctrl_c_ends_a_command_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.report.write_report", interrupted)
    assert main(["report", "run"]) == 130
    assert capsys.readouterr().err in ("", "weft: interrupted\n")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("pretrain.report.write_report", fail)
    with pytest.raises(TypeError, match="a bug"):
        main(["report", "run"])


# --- results


@pytest.mark.parametrize("name", builtin_recipes())
def test_config_as_json_is_one_object_that_is_the_recipe(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["config", name, "train.lr=0.5", "data.test=null", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 1
    assert Recipe.model_validate(json.loads(captured.out)) == load_recipe(name, ["train.lr=0.5", "data.test=null"])


def test_config_shows_each_key_with_value_default_type_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "quickstart", "train.lr=0.25", "eval.templates=['[bold]{}']"]) == 0
    shown = capsys.readouterr().out
    [row] = [line for line in shown.splitlines() if line.startswith("train.lr ")]
    assert row.split()[1:4] == ["0.25", "0.001", "float"]
    assert "peak learning rate" in row
    [row] = [line for line in shown.splitlines() if line.startswith("data.train ")]
    assert "required" in row
    assert "[bold]{}" in shown, "a value is no markup"
    for key in ("model.vision.image_size", "objectives", "layout.zero", "checkpoint.every"):
        assert f"\n{key} " in shown


def test_config_lists_the_keys_inside_lists_and_prints_a_recipe(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", "quickstart", "objectives=[{name: contrastive, label_smoothing: 0.25}]"]) == 0
    shown = capsys.readouterr().out
    for key in ("objectives[].name", "data.also[].weight", "data.schedule[].step"):
        assert f"\n{key} " in shown
    [row] = [line for line in shown.splitlines() if line.startswith("objectives[].label_smoothing ")]
    assert row.split()[1:4] == ["0.25", "0.0", "float"]
    assert main(["config", "quickstart", "train.lr=0.5", "--yaml"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("quickstart", ["train.lr=0.5"])
    assert main(["config", "quickstart", "train.lr=0.5", "train.lr=0.25", "--json"]) == 0
    assert "train.lr is given twice" in capsys.readouterr().err


def test_the_ranks_get_the_same_command_line(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    started: list[Any] = []

    def launch(arguments: list[str], ranks: int) -> int:
        started.append((arguments, ranks))
        return 7

    monkeypatch.setattr("pretrain.launch.launch", launch)
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    settings = [f"data.train={data / 'train'}", "data.test=null", f"run.dir={tmp_path}", "train.global_batch=24"]
    assert main(["train", "quickstart", *settings, "--nproc", "3"]) == 7, "the code of the ranks is the command's"
    assert started == [(["train", "quickstart", *settings, "--nproc", "3"], 3)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*command.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert f"Usage: weft {command} " in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("command", ["", "data", "checkpoint", "bench"])
def test_a_command_alone_shows_its_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert "Usage" in captured.out + captured.err
    assert "weft: " not in captured.err


# --- as a program


def test_help_loads_no_heavy_library() -> None:
    script = """
import sys
from pretrain.cli import main
assert main(["--help"]) == 0 and main(["train", "--help"]) == 0
heavy = {"torch", "deepspeed", "megatron", "numpy", "PIL", "tensorboard", "webdataset", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_the_installed_command_is_this_one(tmp_path: Path) -> None:
    installed = shutil.which("weft", path=str(Path(sys.executable).parent))
    if installed is None:
        pytest.skip("weft is not installed beside this Python")
    done = subprocess.run(
        [installed, "report", "nowhere"], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("weft: nowhere ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
