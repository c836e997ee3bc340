"""Which samples to hold out for the test set: by caption, or some of each class. See split.py for why."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence


def choose_test(captions: Sequence[tuple[str, ...]], test_share: float, seed: int) -> set[int]:
    """Which samples to hold out, by number: about `test_share` of them, whole groups of shared captions at a time.

    At least one group is held out and at least one is kept when `test_share` > 0; of eight samples or more at least two
    are held out, where groups allow, because an evaluation needs them.

    Raises ValueError when all samples are one group.
    """
    refuse_share(test_share)
    if test_share == 0:
        return set()
    groups = _groups(captions)
    if len(groups) < 2:
        raise ValueError(
            f"all {len(captions)} samples are bound together by shared captions or speakers, so none can be held out: "
            "give a test share of 0, or more of them"
        )
    drawn = sorted(groups, key=lambda caption: _place(seed, caption))
    goal = max(round(test_share * len(captions)), _least(len(captions)))
    held_out: list[int] = []
    for caption in drawn[:-1]:  # the last stays for training, whatever the share
        if len(held_out) + len(groups[caption]) <= goal:
            held_out += groups[caption]
    return set(held_out or groups[min(drawn, key=lambda caption: len(groups[caption]))])


def choose_of_classes(classes: Sequence[str], names: Sequence[str], test_share: float, seed: int) -> set[int]:
    """Which samples to hold out, by number: `test_share` of each class, at least one where it has two or more.

    Of the only class at least two, which an evaluation needs, where it has eight.

    Raises ValueError when no class has two samples.
    """
    refuse_share(test_share)
    if test_share == 0:
        return set()
    members: dict[str, list[int]] = {}
    for number, label in enumerate(classes):
        members.setdefault(label, []).append(number)
    held_out: set[int] = set()
    least = _least(len(classes)) if len(members) == 1 else 1
    for numbers in members.values():
        drawn = sorted(numbers, key=lambda number: _place(seed, names[number]))
        held_out.update(drawn[: min(max(least, round(test_share * len(drawn))), len(drawn) - 1)])
    if not held_out:
        raise ValueError(
            f"each of the {len(members)} classes has one sample, so none can be held out: give a test share of 0"
        )
    return held_out


def _least(samples: int) -> int:
    """How many to hold out of a set of this size at least: the two that an evaluation needs, where enough stay."""
    return 2 if samples >= 8 else 1


def plain(caption: str) -> str:
    """The caption by which samples are told apart: letters, digits and marks alone, in one case.

    A caption of nothing but punctuation stays as it is.
    """
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LNM") or caption.strip()


def refuse_share(test_share: float) -> None:
    """ValueError unless a test set of this share leaves something to train on."""
    if not 0 <= test_share < 1:
        raise ValueError(f"the test share is {test_share}: give 0 (no test set) or more, and less than 1")


def _place(seed: int, what: str) -> bytes:
    """Where something stands in the draw."""
    return hashlib.sha256(f"split:{seed}:{what}".encode("utf-8", "surrogatepass")).digest()


def _groups(captions: Sequence[tuple[str, ...]]) -> dict[str, list[int]]:
    """Sample numbers by connected component of shared captions; the smallest plain caption names the component."""
    parent: dict[str, str] = {}

    def root(caption: str) -> str:
        while parent[caption] != caption:
            parent[caption] = parent[parent[caption]]
            caption = parent[caption]
        return caption

    firsts = []
    for of_sample in captions:
        plains = [plain(caption) for caption in of_sample]
        for caption in plains:
            parent.setdefault(caption, caption)
            first, other = root(plains[0]), root(caption)
            parent[max(first, other)] = min(first, other)
        firsts.append(plains[0])
    groups: dict[str, list[int]] = {}
    for number, first_caption in enumerate(firsts):
        groups.setdefault(root(first_caption), []).append(number)
    return groups
