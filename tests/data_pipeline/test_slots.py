"""Slots: taken, lent, free again when the last tensor is gone, and never before."""

import gc
import mmap
import os
import subprocess
import sys

import pytest
import torch

from data_pipeline.slots import PAGE, Slot, Slots, mapped


def test_each_slot_once_and_then_new_memory() -> None:
    slots = Slots(3, 10)
    assert sorted(slots.take().number for _ in range(3)) == [0, 1, 2]
    more = [slots.take(), slots.take()]
    assert [slot.number for slot in more] == [-1, -1]
    one, other = (slots.lend(slot) for slot in more)
    one.fill_(1)
    assert other.sum() == 0


def test_free_when_the_last_view_is_gone() -> None:
    slots = Slots(1, 24)
    slot = slots.take()
    lent = slots.lend(slot)[:24].view(4, 6)
    row, turned = lent[1], lent.T
    array = lent[2:].numpy()
    for _ in range(4):
        extra = slots.take()
        assert extra.number == -1
        slots.lend(extra)  # and so let go of
        lent, row, turned, array = row, turned, array, None
    del lent, row, turned, array
    gc.collect()
    assert slots.take() == slot


@pytest.mark.parametrize("own", [False, True])
def test_lent_memory_outlives_the_slots(own: bool) -> None:
    slots = Slots(0 if own else 2, 1000)
    lent = slots.lend(slots.take())
    lent.fill_(7)
    slots.close()
    del slots
    gc.collect()
    assert lent[:1000].sum() == 7000


def test_slots_begin_at_pages() -> None:
    slots = Slots(3, PAGE + 1)
    assert slots.size == 2 * PAGE
    assert {slots.lend(Slot(number)).data_ptr() % mmap.PAGESIZE for number in range(3)} == {0}


def test_another_process_writes_what_this_one_reads_in_a_file_without_a_name() -> None:
    slots = Slots(3, 5)
    assert os.fstat(slots.fd).st_nlink == 0
    write = (
        "import sys; from data_pipeline.slots import mapped\n"
        f"mapped(int(sys.argv[1]), 0).reshape(3, {slots.size})[1, :5] = range(5)"
    )
    subprocess.run(
        [sys.executable, "-c", write, str(slots.fd)],
        pass_fds=[slots.fd],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert slots.lend(Slot(1))[:5].tolist() == [0, 1, 2, 3, 4]


def test_mapped_whole() -> None:
    slots = Slots(1, 1)
    slots.lend(slots.take())[3] = 9
    assert torch.from_numpy(mapped(slots.fd, 0))[3] == 9
    assert len(mapped(slots.fd, 0)) == PAGE
