"""Zero-shot classification: the class whose prompts are nearest to the image (Radford et al. 2021, section 3.1).

A class is the mean of the embeddings of its prompts ("a picture of a red star"), brought back to unit length.
Ties count against the model, and so does what is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F

KS = (1, 5)
NAMED = 3  # groups of classes named in a note


def zero_shot_scores(
    image_NE: torch.Tensor,
    labels: Sequence[str],
    templates: Sequence[str],
    embed: Callable[[list[str]], torch.Tensor],
    classes: Sequence[str] | None = None,
) -> dict[str, object]:
    """Top-1 and top-5 accuracy over `classes` (default: the labels); `embed` makes prompts into unit embeddings [n, E].

    Also "classes", "images" and "chance" (top-1 of guessing).
    """
    names = sorted(set(labels).union(classes or ()))
    prompts = [template.replace("{}", name) for name in names for template in templates]
    prompt_CTE = embed(prompts).reshape(len(names), len(templates), -1)
    class_CE = F.normalize(prompt_CTE.mean(1), dim=1)
    number = {name: place for place, name in enumerate(names)}
    own_N = torch.tensor([number[label] for label in labels])
    similarity_NC = image_NE @ class_CE.T
    own_N1 = similarity_NC.gather(1, own_N[:, None])
    ahead_N = (~(similarity_NC < own_N1)).sum(1) - 1  # its own is not ahead of itself; a comparison with NaN is false
    usable_N = own_N1[:, 0].isfinite()
    scores = {f"top{k}": float(((ahead_N < k) & usable_N).double().mean()) for k in KS}
    return {**scores, "classes": len(names), "images": len(labels), "chance": 1 / len(names)}


def confusable(names: Sequence[str], templates: Sequence[str], tokens: Callable[[str], bytes]) -> list[str]:
    """Notes about classes that cannot be told apart, or are probably one; [] when there are none.

    tokens: what the model sees of a prompt. Prompts that are cut can be equal although the names differ.
    """
    notes = []
    groups = [list(names)]
    for template in templates:
        prompts = {name: tokens(template.replace("{}", name)) for group in groups for name in group}
        groups = [part for group in groups for part in _alike(group, prompts.__getitem__)]
    if groups:
        notes.append(
            f"{_listed(groups)} have the same prompts after they are cut to the context, so their images count as "
            "wrong: use shorter names or eval.templates, or a longer model.text.context"
        )
    if same := _alike(names, lambda name: " ".join(name.casefold().split())):
        notes.append(f"{_listed(same)} differ in case or spaces only, and count as different classes")
    return notes


def _alike(names: Iterable[str], form: Callable[[str], object]) -> list[list[str]]:
    """The groups of two or more names of one form."""
    groups: dict[object, list[str]] = {}
    for name in names:
        groups.setdefault(form(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _listed(groups: list[list[str]]) -> str:
    """ "4 classes ('a' and 'A', 'b' and 'B')"."""
    named = ", ".join(" and ".join(repr(name) for name in group[:NAMED]) for group in groups[:NAMED])
    shown = sum(len(group[:NAMED]) for group in groups[:NAMED])
    count = sum(map(len, groups))
    return f"{count} classes ({named}{', ...' if shown < count else ''})"
