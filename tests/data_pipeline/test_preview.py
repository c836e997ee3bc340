"""The contact sheet: whole in itself, harmless whatever the captions say, and a card for every sample, bad ones too."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from tars import picture, tar_of

import data_pipeline.preview as module
from data_pipeline.errors import DataError
from data_pipeline.preview import write_preview

EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)"></article>' " & &amp; \u202e {0} {cards} %s"""
OUR_TAGS = {
    "html", "meta", "title", "style", "header", "h1", "p", "main", "article", "div", "img", "footer", "b", "span",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find on a page: tags with their attributes, and the text of each card."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cards: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "article":
            self.cards.append("")

    def handle_data(self, data: str) -> None:
        if self.cards:
            self.cards[-1] += data + "|"

    def images(self) -> list[Image.Image]:
        """The pictures on the page, decoded."""
        sources = [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]


def sheet(tmp_path: Path, files: dict[str, bytes], **options: int) -> Page:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "s0.tar").write_bytes(tar_of(files))
    write_preview(folder, tmp_path / "sheet.html", **options)
    return Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))


def test_picture_caption_label_key_and_shard(tmp_path: Path) -> None:
    files = {"dir/one.jpg": picture(size=(700, 350), kind="JPEG"), "dir/one.txt": "ein Bücherwurm 🐛".encode()}
    page = sheet(tmp_path, files | {"dir/one.json": b'{"label": "worm"}'})
    (card,) = page.cards
    for text in ("ein Bücherwurm 🐛", "worm", "dir/one", "s0.tar", "jpg"):
        assert text in card
    (image,) = page.images()
    assert image.size == (320, 160)


def test_small_pictures_keep_every_pixel(tmp_path: Path) -> None:
    (image,) = sheet(tmp_path, {"a.png": picture(size=(13, 7))}).images()
    original = Image.open(io.BytesIO(picture(size=(13, 7))))
    assert np.array_equal(np.asarray(image), np.asarray(original))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    metadata = json.dumps({"captions": [EVIL, EVIL + "2"], "label": EVIL}).encode()
    files = {"a<b>&.png": picture(), "a<b>&.json": metadata, "c.txt": EVIL.encode(), 'c.<i>"x': b"1"}
    page = sheet(tmp_path, files)
    assert {tag for tag, _ in page.tags} <= OUR_TAGS
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.cards) == 2
    everything = "".join(page.cards)
    assert everything.count(EVIL) == 4
    assert "a<b>&" in everything


def test_the_page_forbids_itself_scripts_and_requests(tmp_path: Path) -> None:
    page = sheet(tmp_path, {"a.png": picture(), "a.txt": b"x"})
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    html = (tmp_path / "sheet.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "url(" not in html


def test_bad_samples_have_cards_that_say_why(tmp_path: Path) -> None:
    files = {
        "half.jpg": picture(size=(90, 90), kind="JPEG")[:900],
        "half.txt": b"still a caption",
        "words.txt": b"only words",
        "bad.png": picture(),
        "bad.json": b"{",
        "latin.png": picture(),
        "latin.txt": b"caf\xe9",
        "empty.png": picture(),
        "empty.txt": b"",
        "none.png": picture(),
        "surrogate.json": rb'{"captions": ["\ud800"]}',
    }
    page = sheet(tmp_path, files)
    keys = ("half", "words", "bad", "latin", "empty", "none", "surrogate")
    cards = {key: card for card in page.cards for key in keys if f"|{key}|" in card}
    assert len(cards) == len(page.cards) == 7
    assert "damaged JPEG" in cards["half"]
    assert "still a caption" in cards["half"]
    assert "no picture" in cards["words"]
    assert "is not JSON" in cards["bad"]
    assert "is not UTF-8" in cards["latin"]
    assert "no caption" in cards["empty"]
    assert "no caption" in cards["none"]
    assert "not Unicode" in cards["surrogate"]
    assert len(page.images()) == 4


def test_sound_has_a_player(tmp_path: Path) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(100), 8000, format="FLAC")
    page = sheet(tmp_path, {"a.flac": file.getvalue(), "a.txt": b"silence"})
    (player,) = [attributes for tag, attributes in page.tags if tag == "audio"]
    kind, _, data = (player["src"] or "").partition(",")
    assert kind == "data:audio/flac;base64"
    assert base64.b64decode(data) == file.getvalue()


def test_long_sound_and_long_captions_do_not_swell_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SOUND", 1000)
    captions = json.dumps({"captions": [f"caption {i} " + "x" * 5000 for i in range(9)]}).encode()
    page = sheet(tmp_path, {"a.wav": b"x" * 1001, "a.json": captions})
    (card,) = page.cards
    assert "too long for this sheet" in card
    assert "audio" not in {tag for tag, _ in page.tags}
    assert "and 4 more captions" in card
    assert len(card) < 5000


def test_count_and_seed_choose_the_samples(tmp_path: Path) -> None:
    files = {f"k{i}.txt": f"number {i}.".encode() for i in range(30)}
    first = sheet(tmp_path, files, count=7, seed=1)
    assert len(first.cards) == 7
    assert len(set(first.cards)) == 7
    out = tmp_path / "again" / "sheet.html"
    write_preview(tmp_path / "set", out, count=7, seed=1)
    assert out.read_text() == (tmp_path / "sheet.html").read_text()
    write_preview(tmp_path / "set", out, count=7, seed=2)
    assert out.read_text() != (tmp_path / "sheet.html").read_text()
    write_preview(tmp_path / "set", out, count=99)
    assert len(Page(out.read_text()).cards) == 30


def test_a_shard_that_shrinks_after_it_was_opened_is_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet(tmp_path, {"a.txt": b"first", "b.txt": b"second"})
    opened = module.open_dataset(tmp_path / "set")
    os.truncate(tmp_path / "set" / "s0.tar", 1030)
    monkeypatch.setattr(module, "open_dataset", lambda folder: opened)
    write_preview(tmp_path / "set", tmp_path / "sheet.html")
    cards = Page((tmp_path / "sheet.html").read_text()).cards
    assert len(cards) == 2
    assert any("first" in card for card in cards)
    assert any("is truncated" in card for card in cards)


def test_bad_requests(tmp_path: Path) -> None:
    sheet(tmp_path, {"a.txt": b"first"})
    with pytest.raises(ValueError, match="count is 0"):
        write_preview(tmp_path / "set", tmp_path / "x.html", count=0)
    with pytest.raises(FileNotFoundError):
        write_preview(tmp_path / "nowhere", tmp_path / "x.html")
    os.truncate(tmp_path / "set" / "s0.tar", 700)
    with pytest.raises(DataError, match="700 bytes"):
        write_preview(tmp_path / "set", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
