"""Slots: taken, lent, free again when the last tensor is gone, and never before."""

import gc
import os
import pickle

import pytest
import torch

from data_pipeline.slots import Slots


def test_each_slot_once() -> None:
    slots = Slots(3, (2, 5))
    assert sorted([slots.take(), slots.take(), slots.take()]) == [0, 1, 2]
    assert slots.take() is None


def test_free_when_the_last_view_is_gone() -> None:
    slots = Slots(1, (4, 6))
    slot = slots.take()
    lent = slots.lend(slot)
    row, turned = lent[1], lent.T
    array = lent[2:].numpy()
    for _ in range(4):
        assert slots.take() is None
        lent, row, turned, array = row, turned, array, None
    del lent, row, turned, array
    gc.collect()
    assert slots.take() == slot


def test_lent_memory_outlives_the_slots() -> None:
    slots = Slots(2, (1000,))
    lent = slots.lend(slots.take())
    lent.fill_(7)
    del slots
    gc.collect()
    assert lent.sum() == 7000


def test_a_forked_process_writes_what_this_one_reads() -> None:
    slots = Slots(3, (5,))
    slot = slots.take()
    process = os.fork()
    if process == 0:
        slots.tensor(slot).copy_(torch.arange(5))
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    assert slots.lend(slot).tolist() == [0, 1, 2, 3, 4]


def test_pickled_it_is_itself() -> None:
    slots = Slots(1, (1,))
    assert pickle.loads(pickle.dumps(slots)) is slots
    letter = pickle.dumps(slots)
    del slots
    gc.collect()
    with pytest.raises(KeyError):
        pickle.loads(letter)
