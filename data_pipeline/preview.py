"""A contact sheet of a data set: one HTML file with pictures, captions, labels and sound, and nothing outside it.

Design choices:
- Captions, keys and labels are hostile until escaped; beyond that the page forbids itself every script and every
  request (Content-Security-Policy), so opening a sheet of strangers' data is safe.
- Pictures are decoded as a run decodes them (upright, on white) and shrunk; what a run cannot decode shows why.
- The samples are drawn evenly from the whole data set by a seed, so two people look at the same sheet.
"""

from __future__ import annotations

import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.damage import opened
from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.index import written_whole
from data_pipeline.order import Order
from data_pipeline.page import embedded, page, readable_size
from data_pipeline.reader import Dataset, open_dataset
from data_pipeline.sample import Sample

THUMBNAIL = 320  # pixels of the longer side at most: sharp at 160 on a dense screen
MOST_CAPTIONS = 5
MOST_CHARACTERS = 600  # of a caption
MOST_SOUND = 4 << 20  # bytes of a sound that the sheet still carries
SOUND_TYPES = {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg"}


def write_preview(folder: Path, out: Path, *, count: int = 48, seed: int = 0) -> None:
    """Write a sheet of `count` samples of the data set in `folder`, drawn by `seed`, to the HTML file `out`.

    Raises FileNotFoundError when there is no data set, DataError when its index and shards disagree, ValueError for a
    count below 1. A single bad sample raises nothing: its card says what is wrong.
    """
    if count < 1:
        raise ValueError(f"count is {count}: give 1 or more")
    dataset = open_dataset(folder)
    count = min(count, len(dataset))
    cards = [_card(dataset, sample) for sample in Order(len(dataset), seed).sample_ids(np.arange(count)).tolist()]
    drawn = f"{count} of them, drawn with seed {seed}" if count < len(dataset) else "all of them"
    shards = len(dataset.index.shards)
    summary = f"{len(dataset):,} samples in {shards:,} shard{'' if shards == 1 else 's'}; {drawn}"
    title, sheet = str(folder), "\n".join(cards)
    body = f"<header><h1>{escape(title)}</h1><p>{summary}</p></header>\n<main>\n{sheet}\n</main>"
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as unfinished:
        unfinished.write_text(page(title, STYLE, body), encoding="utf-8", errors="replace")


def _card(dataset: Dataset, number: int) -> str:
    """One sample as an HTML article, whatever is wrong with it."""
    shard, offset = dataset.locate(number)
    file = dataset.index.shards[shard].file
    place = (
        f'<span title="sample {number} of the data set, {offset} of the shard">{escape(file)} &middot; {offset}</span>'
    )
    try:
        with opened(dataset, number) as sample:
            parts = [f'<div class="picture">{_picture(sample)}</div>', _sound(sample), _words(sample)]
    except DataError as error:
        return f'<article><div class="picture">{_bad(error)}</div><footer>{place}</footer></article>'
    fields = ", ".join(f"{name} {readable_size(len(data))}" for name, data in sample.fields.items())
    footer = f'<footer><b dir="auto">{escape(sample.key)}</b>{place}<span>{escape(fields)}</span></footer>'
    return f"<article>{''.join(parts)}{footer}</article>"


def _picture(sample: Sample) -> str:
    if not sample.image_field:
        return '<p class="none">no picture</p>'
    try:
        pixels = decode_image(sample.fields[sample.image_field])
    except DataError as error:
        return _bad(error)
    height, width, _ = pixels.shape
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG" if width * height <= 128 * 128 else "JPEG", quality=85)  # small pictures show every pixel
    kind = "png" if file.getvalue()[:4] == b"\x89PNG" else "jpeg"
    sharp = ' class="pixels"' if max(width, height) <= 128 else ""
    source = embedded(f"image/{kind}", file.getvalue())
    return f'<img{sharp} src="{source}" alt="" title="{width} x {height} pixels">'


def _sound(sample: Sample) -> str:
    if not sample.audio_field:
        return ""
    data = sample.fields[sample.audio_field]
    if len(data) > MOST_SOUND:
        return f'<p class="none">sound of {readable_size(len(data))}: too long for this sheet</p>'
    kind = SOUND_TYPES[sample.audio_field.rpartition(".")[2]]
    return f'<audio controls preload="metadata" src="{embedded(kind, data)}"></audio>'


def _words(sample: Sample) -> str:
    """Label and captions."""
    try:
        label, captions = sample.label(), sample.captions()
    except DataError as error:
        return _bad(error)
    parts = [] if label is None else [f'<p class="label" dir="auto">{escape(label)}</p>']
    for number, caption in enumerate(captions[:MOST_CAPTIONS]):
        cut = caption[:MOST_CHARACTERS] + (" ..." if len(caption) > MOST_CHARACTERS else "")
        also = ' class="also"' if number else ""  # the first is the one that evaluation reads
        parts.append(f'<p{also} dir="auto">{escape(cut)}</p>')
    if len(captions) > MOST_CAPTIONS:
        parts.append(f'<p class="none">and {len(captions) - MOST_CAPTIONS} more captions</p>')
    if not captions:
        parts.append('<p class="none">no caption</p>')
    return f'<div class="words">{"".join(parts)}</div>'


def _bad(error: DataError) -> str:
    return f'<p class="bad">{escape(str(error))}</p>'


STYLE = """
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 16px; }
article { display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; }
.picture { position: relative; aspect-ratio: 1; background: var(--well); display: grid; place-items: center; }
.picture > p { max-height: 100%; overflow: auto; padding: 10px; }
img { position: absolute; inset: 10px; width: calc(100% - 20px); height: calc(100% - 20px); object-fit: contain; }
img.pixels { image-rendering: pixelated; }
audio { display: block; width: 100%; height: 36px; padding: 4px 8px 0; }
.words { flex: 1; padding: 10px 12px 2px; max-height: 190px; overflow: auto; }
p.also { color: var(--soft); }
.label { display: table; padding: 0 8px; border: 1px solid currentColor; border-radius: 99px; color: var(--label);
  font-size: 12px; }
footer { display: flex; flex-direction: column; margin-top: auto; padding: 8px 12px 10px;
  border-top: 1px solid var(--line); color: var(--soft); overflow-wrap: anywhere;
  font: 11px/1.5 ui-monospace, monospace; }
footer b { color: var(--ink); font-weight: 600; unicode-bidi: isolate; }
"""
