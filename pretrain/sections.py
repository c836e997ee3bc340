"""The sections of a recipe: every key with its type, its default, and one line that `weft config` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class Source(Section):
    data: str = Field(description="as data.train")
    weight: float = Field(1.0, ge=0, description="how much of it is read, against data.weight of data.train")


class Phase(Section):
    step: int = Field(ge=1, description="the first step with these weights")
    weights: tuple[float, ...] = Field(description="of data.train first, then of each of data.also")


class Data(Section):
    train: str = Field(
        description="a folder of shards, its URL (s3://, https://, ...), or Parquet with pictures inside"
    )
    weight: float = Field(1.0, ge=0, description="how much of data.train is read, against those of data.also")
    also: tuple[Source, ...] = Field((), description="more to train on, by weights; mixed in exact proportion")
    schedule: tuple[Phase, ...] = Field((), description="weights that change at a step, in order of their steps")
    block: int = Field(
        0, ge=0, description="neighbours in a shard that are read together, for URLs and Parquet; 0: a full shuffle"
    )
    window: int = Field(64, ge=1, description="blocks that are mixed with each other, where data.block is set")
    test: str | None = Field(None, description="shards to evaluate on, likewise")
    cache: Path = Field(
        Path("~/.cache/weft"), description="folder for what is fetched of shards at a URL, shared by all processes"
    )
    cache_gib: float = Field(50.0, ge=0, description="how much of shards at a URL the cache keeps; 0: nothing")
    loader: Literal["inprocess", "ray"] = Field(
        "inprocess", description="who makes batches: worker processes of each rank, or decoders on any node of a Ray"
    )
    workers: int = Field(
        1,
        ge=0,
        description="loader processes of each (data parallel) rank; 0 decodes in the training process, not on Ray",
    )
    most_workers: int = Field(0, ge=0, description="on Ray: how many they may become while training waits for data")
    ahead_gib: float = Field(1.0, gt=0, description="on Ray: memory of a rank for pictures that are made in advance")
    ray: str = Field(
        "local", description="address of a Ray whose nodes can read data.train; local starts one for this run"
    )
    tokenizer: Path | None = Field(
        None, description="tokenizer.json to use; default: trained on the captions of data.train"
    )
    crop_scale: tuple[float, float] = Field((1.0, 1.0), description="share of the picture's area a training crop keeps")
    aspect: float = Field(
        1.0,
        ge=1,
        description="longer side over shorter that training pictures keep, each batch of one shape; 1: all are squares",
    )
    flip: bool = Field(False, description="mirror half of the training pictures (changes the truth of 'left of')")
    max_corrupt: int = Field(100, ge=0, description="unusable samples to replace and report before the run stops")
    max_corrupt_share: float = Field(
        0.1, ge=0, le=1, description="likewise, as a share of the samples read so far; not asked for the first 7"
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
            raise ValueError(f"aspect is {self.aspect} and {other} is given, but each is an order of its own: give one")
        return self

    @model_validator(mode="after")
    def _weights_fit_the_sources(self) -> Data:
        sources = 1 + len(self.also)
        steps = [phase.step for phase in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"schedule has the steps {steps}, but each comes after the one before")
        for phase in self.schedule:
            if len(phase.weights) != sources:
                raise ValueError(
                    f"schedule has {len(phase.weights)} weights at step {phase.step} for {sources} sources"
                )
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

    @property
    def patches(self) -> int:
        """How many patches a picture has."""
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
    context: int = Field(32, ge=3, description="tokens of a caption, begin and end marks included; longer ones are cut")
    vocab_size: int = Field(1024, ge=260, description="size of the byte-level BPE vocabulary")
    causal: bool = Field(True, description="a token sees only those before it (true) or the whole caption (false)")

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
    text: Text = Field(default_factory=lambda: Text(), description="text tower")
    embed_dim: int = Field(128, ge=1, description="size of the joint embedding")
    logit_scale_init: float = Field(14.3, gt=0, description="initial factor on cosine similarities (1 / temperature)")
    logit_scale_max: float = Field(100.0, gt=0, description="the learned factor never exceeds this")
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


class Objective(Section):
    name: Literal["contrastive", "sigmoid", "caption"] = Field(
        description="contrastive: InfoNCE (CLIP); sigmoid: pairwise (SigLIP); caption: next token, of a captioner"
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
    lr: float = Field(1e-3, gt=0, le=1e30, description="peak learning rate of AdamW")
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
    freeze: tuple[str, ...] = Field(
        (), description="parameters that stay as they are, by the beginning of their names: [vision.] is a whole tower"
    )
    max_skipped: int = Field(
        3,
        ge=0,
        description="steps in a row that may change nothing (bad gradients, spikes) before the run stops",
    )
    spike: float = Field(
        0.0,
        ge=0,
        description="a step changes nothing when its loss is above so many times the median of late; 0: never",
    )
    init_from: Path | None = Field(
        None, description="run folder or checkpoint whose weights a new run begins with; its own checkpoints come first"
    )
    init_only: tuple[str, ...] = Field(
        (), description="which weights of train.init_from, by the beginning of their names: [vision.]; default: all"
    )
    resume: Literal["auto", "never"] = Field("auto", description="auto goes on from the newest checkpoint of run.dir")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    watchdog: float = Field(
        300.0, ge=0, description="seconds without progress after which a rank says who waits for whom, and ends; 0: off"
    )

    @model_validator(mode="after")
    def _a_part_is_of_something(self) -> Train:
        if self.init_only and self.init_from is None:
            raise ValueError("init_only says which weights of init_from to begin with: give train.init_from too")
        return self


class Kernels(Section):
    """Which implementation an operation runs on. tests/pretrain/test_config.py compares the names with kernels'."""

    attention: Literal["auto", "sdpa", "cudnn", "flash", "efficient", "triton", "gluon", "blocked"] = Field(
        "auto", description="of attention; what auto took is said when training begins"
    )
    norm: Literal["auto", "torch", "triton", "apex"] = Field("auto", description="of the norms")
    loss: Literal["auto", "torch", "triton"] = Field("auto", description="of the contrastive losses")


class LayoutConfig(Section):
    auto: bool = Field(False, description="pick the sizes below that fit the memory; `layout=auto` says the same")
    memory_gib: float | None = Field(None, gt=0, description="memory of a device for auto; default: what is there")
    tp: int = Field(1, ge=1, description="tensor parallel ranks")
    pp: int = Field(1, ge=1, description="pipeline stages")
    vpp: int = Field(1, ge=1, description="model chunks a pipeline stage holds")
    cp: int = Field(1, ge=1, description="context parallel ranks")
    ep: int = Field(1, ge=1, description="expert parallel ranks")
    sequence_parallel: bool = Field(False, description="shard norms and residuals along the sequence over the tp ranks")
    zero: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO: 1 shards optimizer, 2 + gradients, 3 + parameters"
    )
    offload: bool = Field(False, description="ZeRO keeps master weights and moments in the host's memory")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations made again in backward: of attention (selective) or of whole layers (full)"
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_by_name(cls, tree: Any) -> Any:
        return {"auto": True} if tree == "auto" else tree


class Checkpoint(Section):
    every: int = Field(500, ge=1, description="steps between two checkpoints; the last step always makes one")
    keep: int = Field(2, ge=1, description="how many of the newest to keep")
    keep_every: int = Field(0, ge=0, description="those of steps that this divides stay for good; 0: none")
    asynchronous: bool = Field(True, description="training goes on while a checkpoint is written")

    @model_validator(mode="after")
    def _what_is_kept_is_saved(self) -> Checkpoint:
        if self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of every ({self.every})")
        return self


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
