"""Which checkpoints stay: the newest and those right before it, however many there are."""

from pathlib import Path

import pytest

from pretrain.checkpoint.format import DESCRIPTION, complete_steps, step_folder
from pretrain.checkpoint.save import _drop_old


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("there", [1, 2, 3, 4, 5])
def test_the_newest_and_those_before_it_stay(tmp_path: Path, keep: int, there: int) -> None:
    steps = [10 * (number + 1) for number in range(there)]
    for step in [*steps, 1000]:  # the last is of a run that was rolled back
        folder = step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / DESCRIPTION).write_text("{}")
    unfinished = tmp_path / "checkpoints" / "step_00000005"
    unfinished.mkdir()
    _drop_old(step_folder(tmp_path, steps[-1]), keep)
    assert complete_steps(tmp_path / "checkpoints") == [step_folder(tmp_path, step) for step in steps[-keep:]]
    assert unfinished.is_dir()
