"""The recipe: one typed tree that says everything about a run.

Design choices:
- A recipe is YAML laid over the defaults below, then dotted overrides (`train.lr=1e-3`); the resolved tree is
  saved with the run. Nothing else (environment, globals) changes what a run does.
- Every key is described where it is declared, so `weft config RECIPE` is the reference manual.
- Unknown keys and wrong types are refused, and the sentence names the nearest key that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from pretrain.errors import RequestError

RECIPES = Path(__file__).parent / "recipes"
VOCABULARY_MULTIPLE = 128  # a token table has a multiple of so many rows, to divide over tensor parallel ranks


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    dir: Path = Field(Path("runs/run"), description="folder of the run: config, metrics, checkpoints, report")
    seed: int = Field(0, ge=0, description="seed of the data order, the augmentation and the initial parameters")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where to train; auto takes CUDA when it is there"
    )


class Data(Section):
    train: Path = Field(description="folder of shards to train on")
    test: Path | None = Field(None, description="folder of shards to evaluate on")
    loader: Literal["inprocess"] = Field("inprocess", description="who makes batches: worker processes of each rank")
    workers: int = Field(1, ge=0, description="loader processes of each rank; 0 decodes in the training process")
    tokenizer: Path | None = Field(
        None, description="tokenizer.json to use; default: trained on the captions of data.train"
    )
    crop_scale: tuple[float, float] = Field((1.0, 1.0), description="share of the picture's area a training crop keeps")
    flip: bool = Field(False, description="mirror half of the training pictures (changes the truth of 'left of')")
    max_corrupt: int = Field(100, ge=0, description="undecodable samples to replace and report before the run stops")

    @model_validator(mode="after")
    def _crop_scale_is_a_range(self) -> Data:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is [{low}, {high}], but a crop keeps 0 < low <= high <= 1 of the area")
        return self


class Tower(Section):
    layers: int = Field(4, ge=1, description="transformer layers")
    width: int = Field(128, ge=1, description="hidden size")
    heads: int = Field(4, ge=1, description="attention heads; width / heads is the size of one")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the feed-forward part over the hidden size")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Tower:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self


class Vision(Tower):
    image_size: int = Field(64, ge=1, description="side of the input picture, pixels")
    patch: int = Field(8, ge=1, description="side of a patch, pixels; divides image_size")
    pool: Literal["class", "mean"] = Field(
        "mean", description="what stands for the picture: a class token or the mean patch"
    )
    positions: Literal["learned", "sincos2d"] = Field("sincos2d", description="position embedding of the patches")

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Vision:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.positions == "sincos2d" and self.width % 4:
            raise ValueError(f"sincos2d positions need a width that is a multiple of 4, not {self.width}")
        return self


class Text(Tower):
    context: int = Field(32, ge=3, description="tokens of a caption, begin and end marks included; longer ones are cut")
    vocab_size: int = Field(1024, ge=260, description="size of the byte-level BPE vocabulary")
    causal: bool = Field(True, description="a token sees only those before it (true) or the whole caption (false)")


class Model(Section):
    vision: Vision = Field(default_factory=lambda: Vision(), description="image tower")
    text: Text = Field(default_factory=lambda: Text(), description="text tower")
    embed_dim: int = Field(128, ge=1, description="size of the joint embedding")
    logit_scale_init: float = Field(14.3, gt=0, description="initial factor on cosine similarities (1 / temperature)")
    logit_scale_max: float = Field(100.0, gt=0, description="the learned factor never exceeds this")
    logit_bias_init: float = Field(-10.0, description="initial bias of the sigmoid loss")


class Objective(Section):
    name: Literal["contrastive", "sigmoid"] = Field(
        description="contrastive: InfoNCE (CLIP); sigmoid: pairwise (SigLIP)"
    )
    weight: float = Field(1.0, description="factor on this loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the contrastive loss")


class Train(Section):
    steps: int = Field(1000, ge=1, description="optimizer steps of the whole schedule")
    stop_at: int | None = Field(None, ge=1, description="end early after this step without changing the schedule")
    global_batch: int = Field(128, ge=1, description="samples of one step, over all ranks; the negatives of the loss")
    micro_batch: int | None = Field(
        None, ge=1, description="samples a rank holds activations for; default: its whole share"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; never on norms, biases, positions and scales")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment")
    beta2: float = Field(0.98, ge=0, lt=1, description="Adam's second moment")
    eps: float = Field(1e-6, gt=0, description="Adam's epsilon")
    grad_clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0 never clips")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of parameters and activations; master weights are fp32"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto goes on from the newest checkpoint of run.dir")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")


class LayoutConfig(Section):
    tp: int = Field(1, ge=1, description="tensor parallel ranks")
    pp: int = Field(1, ge=1, description="pipeline stages")
    vpp: int = Field(1, ge=1, description="model chunks a pipeline stage holds")
    cp: int = Field(1, ge=1, description="context parallel ranks")
    ep: int = Field(1, ge=1, description="expert parallel ranks")
    sequence_parallel: bool = Field(False, description="shard norms and residuals along the sequence over the tp ranks")
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: 1 shards optimizer, 2 + gradients, 3 + parameters"
    )


class Checkpoint(Section):
    every: int = Field(500, ge=1, description="steps between two checkpoints; the last step always makes one")
    keep: int = Field(2, ge=1, description="how many of the newest to keep")


class Eval(Section):
    every: int = Field(500, ge=0, description="steps between two evaluations on data.test; 0: only at the end")
    batch: int = Field(128, ge=1, description="samples embedded at once")
    samples: int = Field(1024, ge=2, description="at most so many test samples, the first ones")
    templates: tuple[str, ...] = Field(
        ("{}", "a {}", "a picture of a {}"),
        min_length=1,
        description="prompts of zero-shot classification; {} is the class name",
    )

    @model_validator(mode="after")
    def _templates_name_the_class(self) -> Eval:
        without = [template for template in self.templates if "{}" not in template]
        if without:
            raise ValueError(f"template {without[0]!r} has no {{}} for the class name")
        return self


class Recipe(Section):
    """Everything about one run."""

    run: Run = Field(default_factory=lambda: Run(), description="where and from which seed")
    data: Data = Field(description="what to read")
    model: Model = Field(default_factory=lambda: Model(), description="what to train")
    objectives: tuple[Objective, ...] = Field(
        (Objective(name="contrastive"),), min_length=1, description="what to minimise: a list of name + weight"
    )
    train: Train = Field(default_factory=lambda: Train(), description="how to train")
    layout: LayoutConfig = Field(default_factory=lambda: LayoutConfig(), description="how to spread over ranks")
    checkpoint: Checkpoint = Field(default_factory=lambda: Checkpoint(), description="when to save")
    eval: Eval = Field(default_factory=lambda: Eval(), description="when and how to evaluate")

    @model_validator(mode="after")
    def _objectives_differ(self) -> Recipe:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives are {names}, but each may stand there once: give it the sum of the weights")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Recipe:
        if self.train.warmup >= self.train.steps:
            raise ValueError(f"train.warmup is {self.train.warmup}, but train.steps is only {self.train.steps}")
        return self

    def yaml(self) -> str:
        """The resolved tree as YAML that `load_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with weft."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe of a built-in name or a YAML file, with `key=value` overrides laid over it.

    Raises RequestError for a file that is missing or not YAML, an unknown key or a value of the wrong type.
    """
    tree = _read(_find(name))
    for override in overrides:
        _lay_over(tree, override)
    return recipe_of(tree, name)


def recipe_of(tree: Mapping[str, Any], name: str) -> Recipe:
    """The recipe of a tree as YAML or JSON gives it; RequestError, which says `name`, for one that is none."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RequestError(f"{name}: " + "; ".join(map(_sentence, _causes(error.errors())))) from None


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below a section with its pydantic field, in the order of declaration."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


def _find(name: str) -> Path:
    if (builtin := RECIPES / f"{name}.yaml").is_file():
        return builtin
    if (path := Path(name)).is_file():
        return path
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise RequestError(f"recipe {name!r} does not exist")
    raise RequestError(f"{name!r} is no recipe: give a YAML file or one of {', '.join(builtin_recipes())}")


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RequestError(f"{path} holds {type(tree).__name__}, but a recipe is a tree of keys")
    return tree


def _lay_over(tree: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in the tree; the value is YAML (`train.lr=1e-3`, `data.crop_scale=[0.5, 1]`)."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RequestError(f"override {override!r} is not of the form key=value")
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RequestError(f"override {override!r}: {parent!r} is a value, not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise RequestError(f"override {override!r}: the value is not YAML ({' '.join(str(error).split())})") from None


def _causes(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without what only follows from an error further down: a list is not too short because its element is wrong."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if not any(len(place) > len(detail["loc"]) and place[: len(detail["loc"])] == detail["loc"] for place in places)
    ]


def _sentence(detail: ErrorDetails) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted!r}" + _nearest(dotted)
        case "missing":
            return f"key {dotted!r} has no value and no default"
        case "model_type":
            return f"{dotted or 'a recipe'} is {detail['input']!r}, but it is a section: give its keys"
        case "value_error":
            return f"{dotted}: {detail['ctx']['error']}" if dotted else str(detail["ctx"]["error"])
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            shown = "a section" if isinstance(detail["input"], Mapping) else repr(detail["input"])
            return f"{dotted} is {shown}: {message}"


def _nearest(dotted: str) -> str:
    known = [key for key, _ in keys_of(Recipe)]
    section = dotted.rpartition(".")[0]
    if section.startswith("objectives."):
        known = [f"{section}.{name}" for name in Objective.model_fields]
    close = difflib.get_close_matches(dotted, known, n=1, cutoff=0.5)
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    best = same_leaf[:1] or close
    return f" (did you mean {best[0]!r}?)" if best else ""
