"""The sections of a recipe: every key with its type, its default, and one line that `weft config` shows.

Which keys matter only under a condition is declared in relevance.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

VOCABULARY_MULTIPLE = 128  # token tables have a multiple of this many rows, to divide over tensor parallel ranks
LARGEST = 1e37  # an update must fit fp32, whose largest number is 3.4e38


def _not_empty(given: Any) -> Any:
    """A path that is there: pathlib takes "", which a shell makes of an unset variable, for the current folder."""
    if isinstance(given, str) and not given.strip():
        raise PydanticCustomError("empty_path", "must be a path")
    return given


AnyPath = Annotated[Path, BeforeValidator(_not_empty)]
UserPath = Annotated[AnyPath, AfterValidator(lambda path: path.expanduser())]  # `~` is the home folder
Location = Annotated[str, BeforeValidator(_not_empty), AfterValidator(os.path.expanduser)]  # a path or a URL


class Section(BaseModel):
    """A frozen part of the tree that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    dir: UserPath = Field(Path("runs/run"), description="folder of the run: config, metrics, checkpoints, report")
    seed: int = Field(0, ge=0, description="seed of the data order, the augmentation and the initial parameters")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device to train on; auto uses CUDA if available"
    )


class Source(Section):
    data: Location = Field(description="shards, as in data.train")
    weight: float = Field(1.0, ge=0, description="share of this source, relative to data.weight of data.train")


class Phase(Section):
    step: int = Field(ge=1, description="number of steps after which these weights apply")
    weights: tuple[float, ...] = Field(description="weight of data.train, then of each entry of data.also")


class Data(Section):
    train: Location = Field(
        description="training data: a folder of shards, its URL (s3://, https://, ...), or Parquet with images"
    )
    weight: float = Field(1.0, ge=0, description="share of data.train, relative to the weights in data.also")
    also: tuple[Source, ...] = Field((), description="more sources to train on, mixed by weight in exact proportion")
    schedule: tuple[Phase, ...] = Field((), description="new weights from given steps on, in order of their steps")
    block: int = Field(
        0, ge=0, description="read N neighbouring samples together (for URLs and Parquet); 0 shuffles single samples"
    )
    window: int = Field(64, ge=1, description="number of blocks shuffled together; needs data.block")
    test: Location | None = Field(None, description="evaluation data, as in data.train")
    cache: AnyPath = Field(
        Path("~/.cache/weft"),
        description="folder for what is fetched of shards at a URL, indexes of read-only folders, and class names",
    )
    cache_gib: float = Field(50.0, ge=0, description="size limit of the cache; 0 keeps nothing")
    loader: Literal["inprocess", "ray"] = Field(
        "inprocess", description="inprocess: worker processes of each rank; ray: decoders anywhere in a Ray cluster"
    )
    workers: int = Field(
        1,
        ge=0,
        description="loader processes per data parallel rank; 0 decodes in the training process (not with Ray)",
    )
    most_workers: int = Field(
        0, ge=0, description="with Ray: add workers up to N while training waits for data; 0 adds none"
    )
    ahead_gib: float = Field(1.0, gt=0, description="with Ray: memory per rank for images decoded in advance")
    ray: str = Field(
        "local", description="address of a Ray cluster whose nodes can read data.train; local starts one for this run"
    )
    tokenizer: UserPath | None = Field(
        None, description="tokenizer.json to use; default: train one on the captions of data.train"
    )
    crop_scale: tuple[float, float] = Field(
        (1.0, 1.0), description="range of the image area that a training crop keeps"
    )
    aspect: float = Field(
        1.0,
        ge=1,
        description="largest ratio of longer to shorter side in training; each batch has one shape; 1 makes all square",
    )
    flip: bool = Field(False, description="mirror half of the training images (this falsifies 'left of' in captions)")
    max_corrupt: int = Field(100, ge=0, description="stop the run after more than N unusable samples")
    max_corrupt_share: float = Field(
        0.1, ge=0, le=1, description="also stop above this share of the samples tried so far; 7 are always allowed"
    )

    @model_validator(mode="after")
    def _crop_scale_is_a_range(self) -> Data:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is [{low}, {high}], but a crop keeps 0 < low <= high <= 1 of the area")
        return self

    @model_validator(mode="after")
    def _one_order_at_a_time(self) -> Data:
        if self.aspect > 1 and (self.also or self.block):
            other = "also" if self.also else "block"
            raise ValueError(
                f"aspect is {self.aspect} and {other} is given, but each sets its own order: use one of them"
            )
        return self

    @model_validator(mode="after")
    def _weights_fit_the_sources(self) -> Data:
        sources = 1 + len(self.also)
        steps = [phase.step for phase in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"schedule has the steps {steps}, but each must come after the one before")
        for phase in self.schedule:
            if len(phase.weights) != sources:
                raise ValueError(
                    f"schedule has {len(phase.weights)} weights at step {phase.step} for {sources} sources"
                )
        return self


class Tower(Section):
    layers: int = Field(4, ge=1, description="number of transformer layers")
    width: int = Field(128, ge=1, description="hidden size")
    heads: int = Field(4, ge=1, description="number of attention heads; must divide width")
    mlp_ratio: float = Field(4.0, gt=0, description="feed-forward width divided by hidden size")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Tower:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        return self

    @model_validator(mode="after")
    def _mlp_has_units(self) -> Tower:
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves no feed-forward units: "
                f"use {1 / self.width:.4g} or more"
            )
        return self


class Vision(Tower):
    image_size: int = Field(64, ge=1, description="side of the input image, pixels")
    patch: int = Field(8, ge=1, description="side of a patch, pixels; must divide image_size")
    pool: Literal["class", "mean"] = Field("mean", description="image embedding: from a class token or the mean patch")
    positions: Literal["learned", "sincos2d"] = Field("sincos2d", description="position embedding of the patches")

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Length of the tower's sequence: the patches, and the class token if there is one."""
        return self.patches + (self.pool == "class")

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Vision:
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.positions == "sincos2d" and self.width % 4:
            raise ValueError(f"sincos2d positions need a width that is a multiple of 4, not {self.width}")
        return self


class Text(Tower):
    context: int = Field(
        32, ge=3, description="length of a caption in tokens, including begin and end marks; longer ones are cut"
    )
    vocab_size: int = Field(
        1024,
        ge=260,
        description="largest size of the byte-level BPE vocabulary; above 1024, a tokenizer trained on the data has at "
        "most two ids for three captions",
    )
    causal: bool = Field(True, description="true: a token attends only to earlier ones; false: to the whole caption")

    @property
    def token_rows(self) -> int:
        """Rows of the token table: the vocabulary, rounded up to divide over tensor parallel ranks."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Model(Section):
    kind: Literal["dual", "captioner"] = Field(
        "dual",
        description="dual: an image and a text tower; captioner: one causal decoder (model.text) over patches and text",
    )
    vision: Vision = Field(default_factory=lambda: Vision(), description="image tower")
    text: Text = Field(default_factory=lambda: Text(), description="text tower, or the decoder of a captioner")
    embed_dim: int = Field(128, ge=1, description="size of the joint embedding")
    logit_scale_init: float = Field(
        14.3, gt=0, description="initial scale of the cosine similarities (1 / temperature)"
    )
    logit_scale_max: float = Field(100.0, gt=0, le=1e6, description="upper limit of the learned scale")
    logit_bias_init: float = Field(-10.0, description="initial bias of the sigmoid loss")

    @property
    def towers(self) -> dict[str, Tower]:
        """The transformers of this model by their section's name."""
        return {"vision": self.vision, "text": self.text} if self.kind == "dual" else {"text": self.text}

    @property
    def sequence_lengths(self) -> dict[str, int]:
        """How many tokens each of its transformers sees, by name."""
        if self.kind == "dual":
            return {"vision": self.vision.tokens, "text": self.text.context}
        return {"picture and caption": self.vision.patches + self.text.context}

    @model_validator(mode="after")
    def _scale_begins_below_its_limit(self) -> Model:
        if self.logit_scale_init > self.logit_scale_max:
            raise ValueError(
                f"logit_scale_init is {self.logit_scale_init}, above logit_scale_max={self.logit_scale_max}: "
                "raise the limit, or begin lower"
            )
        return self


class Objective(Section):
    name: Literal["contrastive", "sigmoid", "caption"] = Field(
        description="contrastive: InfoNCE (CLIP); sigmoid: pairwise (SigLIP); caption: next token, for a captioner"
    )
    weight: float = Field(1.0, gt=0, description="factor on this loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of the contrastive loss")


class Train(Section):
    steps: int = Field(1000, ge=1, description="number of optimizer steps of the whole schedule")
    stop_at: int | None = Field(None, ge=1, description="end after this step without changing the schedule")
    global_batch: int = Field(128, ge=1, description="samples per step over all ranks; also the negatives of the loss")
    micro_batch: int | None = Field(
        None, ge=1, description="samples per rank that are processed at once; default: its whole share"
    )
    lr: float = Field(1e-3, gt=0, le=1e30, description="peak learning rate of AdamW")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine; at most lr")
    warmup: int = Field(100, ge=0, description="number of steps of linear warm-up")
    weight_decay: float = Field(
        0.1, ge=0, le=1e6, description="weight decay of matrices; norms, biases, positions and scales have none"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the first moment")
    beta2: float = Field(0.98, ge=0, lt=1, description="Adam's decay of the second moment")
    eps: float = Field(1e-6, gt=0, le=1e30, description="Adam's epsilon")
    grad_clip: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0 disables")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of parameters and activations; master weights are always fp32"
    )
    freeze: tuple[str, ...] = Field(
        (), description="freeze parameters whose names start with one of these prefixes: [vision.] freezes that tower"
    )
    max_skipped: int = Field(
        3, ge=0, description="stop after more than N skipped updates in a row (bad gradients, spikes)"
    )
    spike: float = Field(
        0.0,
        ge=0,
        description="skip the update when the loss exceeds this multiple of the recent median (above 1); 0 disables",
    )
    init_from: UserPath | None = Field(
        None, description="run folder or checkpoint to take the weights of a new run from; not read when it resumes"
    )
    init_only: tuple[str, ...] = Field(
        (), description="take only weights whose names start with one of these prefixes: [vision.]; default: all"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto resumes from the newest checkpoint in run.dir")
    log_every: int = Field(10, ge=1, description="write a line of metrics.jsonl every N steps")
    watchdog: float = Field(
        300.0,
        ge=0,
        description="seconds without progress until a run reports which rank blocks it, and ends; 0 disables",
    )

    @model_validator(mode="after")
    def _a_part_is_of_something(self) -> Train:
        if self.init_only and self.init_from is None:
            raise ValueError("init_only says which weights of init_from to begin with: give train.init_from too")
        return self

    @model_validator(mode="after")
    def _rate_goes_down(self) -> Train:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, above lr={self.lr}, and the rate would rise: use at most lr")
        if self.lr * max(1 / (1 - self.beta1), self.weight_decay) > LARGEST:
            raise ValueError(
                f"lr is {self.lr}, and with beta1={self.beta1} and weight_decay={self.weight_decay} its updates exceed "
                "the largest number of fp32: use a smaller one"
            )
        return self

    @model_validator(mode="after")
    def _spike_is_above_the_median(self) -> Train:
        if 0 < self.spike <= 1:
            raise ValueError(
                f"spike is {self.spike}, so that usual losses would be skipped: use more than 1, or 0 for off"
            )
        return self

    @model_validator(mode="after")
    def _ends_within_the_schedule(self) -> Train:
        if self.stop_at is not None and self.stop_at > self.steps:
            raise ValueError(f"stop_at is {self.stop_at}, but the run ends at steps={self.steps}: leave stop_at out")
        return self


class Kernels(Section):
    """Which implementation an operation runs on. tests/pretrain/test_config.py compares the names with kernels'."""

    attention: Literal["auto", "sdpa", "cudnn", "flash", "efficient", "triton", "gluon", "blocked"] = Field(
        "auto", description="implementation of attention; the choice of auto is printed when training begins"
    )
    norm: Literal["auto", "torch", "triton", "apex"] = Field("auto", description="implementation of the norms")
    loss: Literal["auto", "torch", "triton"] = Field("auto", description="implementation of the losses")


class LayoutConfig(Section):
    auto: bool = Field(
        False, description="choose tp, pp, zero, recompute and train.micro_batch to fit the memory; also: layout=auto"
    )
    memory_gib: float | None = Field(None, gt=0, description="memory of a device for auto; default: what is there")
    tp: int = Field(1, ge=1, description="number of tensor parallel ranks")
    pp: int = Field(1, ge=1, description="number of pipeline stages")
    vpp: int = Field(1, ge=1, description="number of model chunks per pipeline stage")
    cp: int = Field(1, ge=1, description="number of context parallel ranks")
    ep: int = Field(1, ge=1, description="number of expert parallel ranks")
    sequence_parallel: bool = Field(False, description="shard norms and residuals along the sequence over the tp ranks")
    zero: Literal[0, 1, 2, 3] | None = Field(
        None,
        description="ZeRO stage: 0 shards nothing, 1 the optimizer, 2 also gradients, 3 also parameters; "
        "default: 0 for a small model in fp32, else 1",
    )
    offload: bool = Field(False, description="keep master weights and moments in host memory")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="recompute activations in backward: of attention (selective) or of whole layers (full)"
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_by_name(cls, tree: Any) -> Any:
        return {"auto": True} if tree == "auto" else tree


class Checkpoint(Section):
    every: int = Field(500, ge=1, description="save every N steps; the last step is always saved")
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    keep_every: int = Field(0, ge=0, description="keep checkpoints permanently every N steps; 0 keeps none")
    asynchronous: bool = Field(True, description="train on while a checkpoint is written")

    @model_validator(mode="after")
    def _what_is_kept_is_saved(self) -> Checkpoint:
        if self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of every ({self.every})")
        return self


class Eval(Section):
    every: int = Field(500, ge=0, description="evaluate on data.test every N steps; 0: only at the end")
    batch: int = Field(128, ge=1, description="number of samples embedded at once")
    samples: int = Field(1024, ge=2, description="evaluate at most N test samples, spread over the whole set")
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
