"""Pixels and aspect of the picture, as its header has them: nothing is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.filters.step import Drop, SampleStep
from data_pipeline.sample import Sample
from data_pipeline.stats import image_size


@dataclass(frozen=True)
class ImageSize(SampleStep):
    """Remove samples whose picture is too small, too large or too long.

    Sides in pixels; `max_aspect`: the longer side by the shorter one. `required`: also those without a picture.
    """

    name = "image-size"

    min_side: int = 32
    max_side: int | None = None
    max_aspect: float | None = 5.0
    required: bool = False

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(f"image-size:max_side is {self.max_side}, below its min_side, {self.min_side}")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"image-size:max_aspect is {self.max_aspect}: give 1 (only squares) or more")

    def look(self, sample: Sample) -> Drop | None:
        if sample.image_field is None:
            return Drop("no picture") if self.required else None
        width, height = image_size(sample.fields[sample.image_field])
        detail = f"{width} x {height}"
        shorter, longer = sorted((width, height))
        if shorter < self.min_side:
            return Drop(f"shorter side below {self.min_side} pixels", detail)
        if self.max_side is not None and longer > self.max_side:
            return Drop(f"longer side above {self.max_side} pixels", detail)
        if self.max_aspect is not None and longer > self.max_aspect * shorter:
            return Drop(f"aspect above {self.max_aspect:g}", detail)
        return None
