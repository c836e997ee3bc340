"""A contact sheet of a data set: one HTML file with pictures, captions, labels and sound, and nothing outside it.

Design choices:
- Captions, keys and labels are hostile until escaped; beyond that the page forbids itself every script and every
  request (Content-Security-Policy), so opening a sheet of strangers' data is safe.
- Pictures are decoded as a run decodes them (upright, on white) and shrunk; what a run cannot decode shows why.
- The samples are drawn evenly from the whole data set by a seed, so two people look at the same sheet.
"""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError
from data_pipeline.index import written_whole
from data_pipeline.order import Order
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
    page = PAGE.format(title=escape(str(folder)), summary=summary, cards="\n".join(cards))
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as unfinished:
        unfinished.write_text(page, encoding="utf-8", errors="replace")


def _card(dataset: Dataset, number: int) -> str:
    """One sample as an HTML article, whatever is wrong with it."""
    shard, offset = dataset.locate(number)
    file = dataset.index.shards[shard].file
    place = (
        f'<span title="sample {number} of the data set, {offset} of the shard">{escape(file)} &middot; {offset}</span>'
    )
    try:
        sample = dataset.read(number)
    except DataError as error:
        return f'<article><div class="picture">{_bad(error)}</div><footer>{place}</footer></article>'
    parts = [f'<div class="picture">{_picture(sample)}</div>', _sound(sample), _words(sample)]
    fields = ", ".join(f"{name} {_size(len(data))}" for name, data in sample.fields.items())
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
    source = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img{sharp} src="{source}" alt="" title="{width} x {height} pixels">'


def _sound(sample: Sample) -> str:
    if not sample.audio_field:
        return ""
    data = sample.fields[sample.audio_field]
    if len(data) > MOST_SOUND:
        return f'<p class="none">sound of {_size(len(data))}: too long for this sheet</p>'
    kind = SOUND_TYPES[sample.audio_field.rpartition(".")[2]]
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<audio controls preload="metadata" src="{source}"></audio>'


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
        parts.append(f'<p{also} dir="auto">{escape(cut)}</p>' if cut.strip() else '<p class="none">empty caption</p>')
    if len(captions) > MOST_CAPTIONS:
        parts.append(f'<p class="none">and {len(captions) - MOST_CAPTIONS} more captions</p>')
    if not captions:
        parts.append('<p class="none">no caption</p>')
    return f'<div class="words">{"".join(parts)}</div>'


def _bad(error: DataError) -> str:
    return f'<p class="bad">{escape(str(error))}</p>'


def _size(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size / 1024:.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --page: #f4f3ef; --card: #fff; --ink: #22211e; --soft: #77736a; --line: #e3e0d8;
  --well: #eeece6; --label: #2b5f8a; --bad: #b3261e; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #171614; --card: #22201d; --ink: #ebe8e1; --soft: #98938a;
  --line: #36332e; --well: #1b1a17; --label: #8fbfe6; --bad: #ff8a80; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1480px; padding: 28px 24px 48px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 22px; font-weight: 650; overflow-wrap: anywhere; }}
header p {{ margin: 2px 0 22px; color: var(--soft); }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 16px; }}
article {{ display: flex; flex-direction: column; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; overflow: hidden; }}
.picture {{ position: relative; aspect-ratio: 1; background: var(--well); display: grid; place-items: center; }}
.picture > p {{ max-height: 100%; overflow: auto; padding: 10px; }}
img {{ position: absolute; inset: 10px; width: calc(100% - 20px); height: calc(100% - 20px); object-fit: contain; }}
img.pixels {{ image-rendering: pixelated; }}
audio {{ display: block; width: 100%; height: 36px; padding: 4px 8px 0; }}
.words {{ flex: 1; padding: 10px 12px 2px; max-height: 190px; overflow: auto; }}
p.also {{ color: var(--soft); }}
p {{ margin: 0 0 6px; overflow-wrap: anywhere; unicode-bidi: isolate; }}
.label {{ display: table; padding: 0 8px; border: 1px solid currentColor; border-radius: 99px; color: var(--label);
  font-size: 12px; }}
.none {{ color: var(--soft); font-style: italic; }}
.bad {{ color: var(--bad); font-size: 12px; padding: 8px; }}
footer {{ display: flex; flex-direction: column; margin-top: auto; padding: 8px 12px 10px;
  border-top: 1px solid var(--line); color: var(--soft); overflow-wrap: anywhere;
  font: 11px/1.5 ui-monospace, monospace; }}
footer b {{ color: var(--ink); font-weight: 600; unicode-bidi: isolate; }}
</style>
<header><h1>{title}</h1><p>{summary}</p></header>
<main>
{cards}
</main>
</html>
"""
