"""The names of a model's parameters, known from its settings before anything is built.

They are those of the whole model, under no layout (`pieces.parameters_by_name`); a test compares them with models that
were built. Each comes with the pipeline stages that hold it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from pretrain.sections import Model, Tower

LAYER = tuple(
    f"{part}.{kind}"
    for part in (
        "input_layernorm",
        "self_attention.linear_proj",
        "self_attention.linear_qkv",
        "pre_mlp_layernorm",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
    for kind in ("weight", "bias")
)


def parameter_names(model: Model, pp: int = 1, vpp: int = 1) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, the stages that hold it) of every parameter."""
    first, last = (0,), (pp - 1,)
    learned = model.vision.positions == "learned"
    if model.kind == "captioner":
        patches = ["patches.linear.weight", "patches.linear.bias", *(["patches.positions"] if learned else [])]
        yield from ((f"decoder.{name}", first) for name in ("positions", *patches))
        yield "decoder.tokens.weight", tuple({0, pp - 1})
        yield from _block("decoder", model.text, pp, vpp)
        return
    inputs = ["patches.linear.weight", "patches.linear.bias", *(["patches.positions"] if learned else [])]
    inputs += ["class_token"] if model.vision.pool == "class" else []
    yield from ((f"vision.{name}", first) for name in inputs)
    yield from _block("vision", model.vision, pp, vpp)
    yield "vision.projection.weight", last
    yield from ((f"text.{name}", first) for name in ("positions", "tokens.weight"))
    yield from _block("text", model.text, pp, vpp)
    yield from ((name, last) for name in ("text.projection.weight", "logit_scale.log", "logit_bias.value"))


def _block(tower: str, settings: Tower, pp: int, vpp: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(settings.layers):
        stage = layer * pp * vpp // settings.layers % pp
        yield from ((f"{tower}.block.layers.{layer}.{name}", (stage,)) for name in LAYER)
    yield from ((f"{tower}.block.final_layernorm.{kind}", (pp - 1,)) for kind in ("weight", "bias"))


def nearest_prefix(wrong: str, names: list[str]) -> str | None:
    """The prefix of some name that `wrong` is most like, up to a whole part: "vision." for "visual."."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known.update(dict.fromkeys(".".join(parts[:count]) + "." for count in range(1, len(parts))))
        known[name] = None
    return next(iter(difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)), None)
