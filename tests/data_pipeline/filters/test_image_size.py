"""Size and aspect of pictures, read from their headers."""

import pytest
from tars import picture

from data_pipeline.errors import DataError
from data_pipeline.filters import Drop, parse_steps
from data_pipeline.filters.image_size import ImageSize
from data_pipeline.sample import Sample


def sized(width: int, height: int, kind: str = "PNG") -> Sample:
    return Sample("a", {kind.lower().replace("jpeg", "jpg"): picture(0, (width, height), kind)})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_limits_are_where_they_are_set(kind: str) -> None:
    step = ImageSize(min_side=10, max_side=40, max_aspect=3.0)
    assert step.look(sized(10, 30, kind)) is None
    assert step.look(sized(40, 40, kind)) is None
    assert step.look(sized(9, 20, kind)) == Drop("shorter side below 10 pixels", "9 x 20")
    assert step.look(sized(20, 9, kind)) == Drop("shorter side below 10 pixels", "20 x 9")
    assert step.look(sized(20, 41, kind)) == Drop("longer side above 40 pixels", "20 x 41")
    assert step.look(sized(31, 10, kind)) == Drop("aspect above 3", "31 x 10")


def test_only_the_header_is_read() -> None:
    whole = sized(50, 60, "JPEG").fields["jpg"]
    assert ImageSize().look(Sample("a", {"jpg": whole[:700]})) is None


def test_without_a_picture_or_with_a_bad_one() -> None:
    assert ImageSize().look(Sample("a", {"txt": b"text"})) is None
    assert ImageSize(required=True).look(Sample("a", {"txt": b"text"})) == Drop("no picture")
    with pytest.raises(DataError):
        ImageSize().look(Sample("a", {"jpg": b"no picture"}))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="below its min_side"):
        parse_steps(["image-size:min_side=64,max_side=32"])
    with pytest.raises(ValueError, match="max_aspect is 0"):
        parse_steps(["image-size:max_aspect=0.5"])
