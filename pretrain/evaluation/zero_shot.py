"""Zero-shot classification: the class whose prompts are nearest to the picture (Radford et al. 2021, section 3.1).

A class is the mean of the embeddings of its prompts ("a picture of a red star"), brought back to unit length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

KS = (1, 5)


def zero_shot_scores(
    image_NE: torch.Tensor,
    labels: Sequence[str],
    templates: Sequence[str],
    embed: Callable[[list[str]], torch.Tensor],
) -> dict[str, object]:
    """Top-1 and top-5 accuracy over the distinct labels; `embed` makes prompts into unit embeddings [n, E].

    Also "classes", "pictures" and "chance" (top-1 of a coin).
    """
    classes = sorted(set(labels))
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    prompt_CTE = embed(prompts).reshape(len(classes), len(templates), -1)
    class_CE = F.normalize(prompt_CTE.mean(1), dim=1)
    own_N = torch.tensor([classes.index(label) for label in labels])
    similarity_NC = image_NE @ class_CE.T
    own = similarity_NC.gather(1, own_N[:, None])
    ahead = (similarity_NC >= own).sum(1) - 1  # ties count against the model
    scores = {f"top{k}": float((ahead < k).double().mean()) for k in KS}
    return {**scores, "classes": len(classes), "pictures": len(labels), "chance": 1 / len(classes)}
