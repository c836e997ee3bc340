"""The report: true to the run folder, a dash where a number is missing, harmless whatever the strings say."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from ranks import run_ranks

from data_pipeline.scenes.synth import synthesise
from pretrain.config import Recipe, load_recipe
from pretrain.errors import RequestError
from pretrain.report import write_report

EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)"></td></svg>' " & &amp; \u202e {0} {style} %s"""
OUR_TAGS = {
    "html", "meta", "title", "style", "header", "h1", "h2", "h3", "p", "main", "section", "article", "div", "i", "b",
    "span", "figure", "figcaption", "output", "svg", "path", "text", "g", "rect", "circle", "dl", "dd", "dt", "ol",
    "li", "img", "table", "thead", "tbody", "tr", "th", "td", "code", "details", "summary",
}  # fmt: skip
START = 1_700_000_000.0


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the text of each section by its heading."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.html = html
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.texts.append("\n\n")
        if tag not in ("meta", "img", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "html":
            assert self.open.pop() == tag, "a tag is closed that is not the innermost open one"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        """All text, a bar between the pieces, sections apart."""
        return "|".join(self.texts)

    def section(self, title: str) -> str:
        """The text below a heading; "" when there is none."""
        return next((part for part in self.text.split("\n\n") if part.startswith(f"|{title}|")), "")

    def lines(self, look: str) -> list[str]:
        """The path of each curve that has a look."""
        paths = [a["d"] or "" for tag, a in self.tags if tag == "path" and a.get("class") == f"curve {look}"]
        return [path for path in paths if path != "M0 4H24"]  # which is in the legend


def recipe(**train: Any) -> Recipe:
    settings = {"steps": 40, "warmup": 4, "global_batch": 24, "log_every": 5, **train}
    return Recipe.model_validate({"data": {"train": "data/train", "test": "data/test"}, "train": settings})


def line(step: int, **changes: Any) -> dict[str, Any]:
    """A logged step; odd values, so that each can be found again."""
    told = {
        "step": step,
        "epoch": step * 24 / 1000,
        "samples": step * 24,
        "loss": 1 + 2 / step,
        "grad_norm": 0.37 + step / 100,
        "lr": 0.001,
        "logit_scale": 14.3 + step,
        "samples_per_s": 77.7,
        "tflops": 0.123,
        "mfu": None,
        "data_wait": 0.031,
        "memory_gib": 1.57,
        "time": START + 3 + step,
    }
    return told | changes


def evaluation(step: int, r10: float = 0.83, captions: int = 211) -> dict[str, Any]:
    recalls = {"r1": 0.314, "r5": 0.592, "r10": r10}
    ways = {"image_to_text": recalls, "text_to_image": {"r1": 0.271, "r5": 0.51, "r10": r10 + 0.011}}
    chance = {key: {f"r{k}": k / captions for k in (1, 5, 10)} for key in ("image_to_text", "text_to_image")}
    zero_shot = {"top1": 0.16, "top5": 0.7, "classes": 8, "images": 53, "chance": 0.125}
    return {
        "step": step,
        "samples": step * 24,
        "retrieval": {**ways, "images": 211, "captions": 1055, "distinct_captions": captions, "chance": chance},
        "zero_shot": zero_shot,
    }


def jpeg(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (7, 5), colour).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def run_folder(
    run: Path,
    steps: list[dict[str, Any]],
    *,
    config: Recipe | None = None,
    evaluations: list[dict[str, Any]] | None = None,
    starts: list[tuple[int, float]] | None = None,
    **files: Any,
) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text((config or recipe()).yaml(), encoding="utf-8")
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in steps))
    (run / "evaluation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in evaluations or []))
    begun = [{"step": step, "time": time, "layout": "dp1 x tp1", "world": 1} for step, time in starts or [(0, START)]]
    manifest = {"data_fingerprint": "f00d", "code": "abc123+changes", "versions": {"torch": "2.99"}, "starts": begun}
    (run / "manifest.json").write_text(json.dumps(manifest | files.pop("manifest", {})))
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    return run


def report(run: Path) -> Page:
    out = run.parent / "pages" / f"{run.name}.html"
    assert write_report(run, out) == out
    return Page(out.read_text(encoding="utf-8"))


def test_a_finished_run(tmp_path: Path) -> None:
    steps = [line(step) for step in (1, *range(5, 41, 5))]
    page = report(run_folder(tmp_path / "my run", steps, evaluations=[evaluation(20), evaluation(40)]))
    assert "|my run|Finished|: trained to step 40." in page.text
    assert "|Steps|40|of 40|Samples|960|0.96 epochs|Time|43 s|to the last logged step|" in page.text
    assert f"|Final loss|1.05|guessing: {math.log(24):.3f}" in page.text
    assert "|R@1|31.4%|guessing 0.5%|R@5|59.2%|guessing 2.4%|R@10|83.0%|guessing 4.7%|" in page.text
    assert "|R@1|27.1%|guessing 0.5%|R@5|51.0%|guessing 2.4%|R@10|84.1%|guessing 4.7%|" in page.text
    assert "|top-1|16.0%|guessing 12.5%|top-5|70.0%|guessing 62.5%" in page.text
    for text in ("|77.7|samples a second|", "|0.123|TFLOP/s a rank|", "|3.1%|of the time", "|1.57|GiB peak"):
        assert text in page.section("Speed")
    assert "not known for this device" in page.section("Speed")
    assert len(page.open) == 0


def test_scores_count_only_when_they_are_surely_above_guessing(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path / "r", [line(40)], evaluations=[evaluation(40, r10=0.08)]))
    # 3 standard errors around 4.7% of 211 questions reach to 9.1%; around 12.5% of 53, to 26.1%
    assert "Above guessing" not in page.text
    assert "No better than guessing: Image to text R@10 8.0% (guessing: 4.7%), Text to image R@10 9.1%" in page.text
    assert "Zero-shot top-1 16.0% (guessing: 12.5%)" in page.text
    page = report(run_folder(tmp_path / "r", [line(40)], evaluations=[evaluation(40, r10=0.1)]))
    assert "Above guessing: Image to text R@10 10.0% (guessing: 4.7%), Text to image R@10 11.1%" in page.text
    page = report(run_folder(tmp_path / "r", [line(40)], evaluations=[evaluation(40, r10=0.0)]))
    assert "Below guessing: Image to text R@10 0.0%" in page.text


def test_a_loss_at_chance_is_called_so_only_for_the_contrastive_loss(tmp_path: Path) -> None:
    collapsed = [line(40, loss=3.17, loss_contrastive=3.2, loss_sigmoid=0.31)]
    assert "no better than guessing" in report(run_folder(tmp_path / "r", collapsed)).text
    smaller = recipe(global_batch=23)  # ln 23 = 3.135
    assert "no better than guessing" in report(run_folder(tmp_path / "r", collapsed, config=smaller)).text
    larger = recipe(global_batch=26)  # ln 26 = 3.258
    assert "no better than guessing" not in report(run_folder(tmp_path / "r", collapsed, config=larger)).text
    both = [{"name": "contrastive", "weight": 0.5}, {"name": "sigmoid", "weight": 2.0}]
    mixed = Recipe.model_validate(recipe().model_dump() | {"objectives": both})
    page = report(run_folder(tmp_path / "r", collapsed, config=mixed))
    assert "no better than guessing" not in page.text
    learning = page.section("Learning")
    assert f"|Loss of contrastive, unweighted|3.2|each logged step|guessing: {math.log(24):.3f}|" in learning
    assert "|Loss of sigmoid, unweighted|0.31|" in learning
    assert "guessing" not in learning.partition("|Loss of contrastive")[0]


def test_guessing_is_what_the_evaluation_says_of_each_k(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path / "r", [line(40)], evaluations=[evaluation(40, captions=50)]))
    assert "|R@1|31.4%|guessing 2.0%|R@5|59.2%|guessing 10.0%|R@10|83.0%|guessing 20.0%|" in page.text
    assert "|R@1|27.1%|guessing 2.0%|R@5|51.0%|guessing 10.0%|R@10|84.1%|guessing 20.0%|" in page.text


def test_an_interrupted_and_resumed_run(tmp_path: Path) -> None:
    before = [line(step) for step in (1, 5, 10)]
    after = [line(step, time=START + 1000 + step) for step in (11, 15)]
    run = run_folder(tmp_path / "r", before + after, starts=[(0, START), (10, START + 1000)])
    page = report(run)
    assert "|Interrupted, or still running|: step 15 of 40 is the last that is logged." in page.text
    assert "There is no checkpoint to go on from." in page.text
    assert "|Time|28 s|to the last logged step, 1 pause left out|" in page.text  # 13 s, and 15 s after the pause
    assert "Loss so far" in page.text
    assert page.text.count("resumed from step 10, 2023-11-14 22:30 UTC") == 7  # on each curve
    assert "No evaluation: none is logged; eval.every is 500." in page.section("Evaluation")
    assert "|2 starts|" in page.section("Environment")


def test_a_run_that_diverged_and_losses_that_are_not_finite(tmp_path: Path) -> None:
    steps = [line(1), *(line(step, loss=None, skipped=step - 1) for step in (2, 3, 4))]
    page = report(run_folder(tmp_path / "r", steps))
    assert "The last logged loss is not finite. 3 steps changed nothing and were skipped." in page.text
    assert "|Loss so far|not finite|" in page.text
    diverged = {"step": 5, "why": "the loss is <nan>", "good": "step_00000001"}
    manifest = {"starts": [{"step": 0, "time": START, "diverged": diverged}]}
    page = report(run_folder(tmp_path / "r", steps, manifest=manifest))
    assert "|Diverged|at step 5: the loss is <nan>. Its last good checkpoint is step_00000001. 3 steps" in page.text
    assert "Interrupted" not in page.text
    manifest["starts"].append({"step": 1, "time": START + 100})  # it was resumed
    assert "|Interrupted, or still running|" in report(run_folder(tmp_path / "r", steps, manifest=manifest)).text


def test_stopping_where_asked_is_no_interruption(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path / "r", [line(15)], config=recipe(stop_at=15)))
    assert "|Finished|: trained to step 15 as train.stop_at asks; its schedule has 40." in page.text
    assert "|Steps|15|of 15|" in page.text


def test_one_step_and_none(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path / "one", [line(1)]))
    assert "step 1 of 40" in page.text
    dots = [attributes for tag, attributes in page.tags if tag == "circle" and attributes.get("class") == "first"]
    assert len(dots) == 7  # a line of one point could not be seen
    run = run_folder(tmp_path / "none", [])
    (run / "manifest.json").unlink()
    (run / "evaluation.jsonl").unlink()
    page = report(run)
    assert "|none|No step is logged yet.|Steps|0|of 40|Samples|–|Time|–|" in page.text
    assert not page.section("Learning")
    assert "manifest.json is missing" in page.section("Environment")


def test_missing_numbers_are_dashes_and_gaps(tmp_path: Path) -> None:
    steps = [line(step) for step in range(1, 11)]
    del steps[4]["logit_scale"]
    steps[5] |= {"logit_scale": float("nan"), "loss": "fast", "tflops": None}
    steps[9] = {"step": 10}
    page = report(run_folder(tmp_path / "r", steps, manifest={"starts": "soon"}))
    scale = page.lines("first")[3]
    assert scale.count("M") == 2
    assert scale.count("L") == 5  # steps 1 to 4, 7 to 9
    assert "|Samples|–|" in page.text
    assert "|Time|–|" in page.text
    assert "|Loss so far|–|" in page.text
    assert "|–|GiB peak memory" in page.section("Speed")
    assert "nan" not in page.html.replace("-nan-", "").lower()


def test_long_runs_keep_their_spikes_and_stay_small(tmp_path: Path) -> None:
    steps = [line(step, grad_norm=900.0 if step == 7777 else 1.0 + step % 3 / 10) for step in range(1, 20_001)]
    page = report(run_folder(tmp_path / "r", steps, config=recipe(steps=20_000)))
    raw = page.lines("faint")[1]  # of the gradient norm
    assert raw.count("L") < 700
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", raw)]
    lowest_ordinary = sorted(heights)[1]
    assert min(heights) < lowest_ordinary - 50
    assert len(page.html) < 400_000


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    found = [
        {"caption": EVIL + "1", "right": True, "similarity": 0.5, "jpeg": jpeg("red")},
        {"caption": EVIL, "right": "yes", "similarity": EVIL, "jpeg": '" onload="x'},
        {"caption": [EVIL], "jpeg": base64.b64encode(b"<svg onload=alert(1)>").decode()},
        EVIL,
    ]
    config = recipe().model_dump() | {
        "run": {"dir": EVIL},
        "data": {"train": EVIL},
        "eval": {"templates": [EVIL + " {}"]},
    }
    run = run_folder(
        tmp_path / "a<b>&",
        [line(40, **{EVIL: EVIL})],
        config=Recipe.model_validate(config),
        evaluations=[evaluation(40)],
        examples=[{"caption": EVIL, "pictures": found}, {"pictures": EVIL}, EVIL],
        manifest={"code": EVIL, "machine": EVIL, "versions": {EVIL: EVIL}, "world": {"x": EVIL}},
        starts=[(0, START)],
    )
    bad = {"sample": EVIL, "key": EVIL, "shard": EVIL, "reason": EVIL}
    (run / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")
    (run / "checkpoints" / f"step_{EVIL.replace('/', '')}").mkdir(parents=True)
    page = report(run)
    assert {tag for tag, _ in page.tags} <= OUR_TAGS
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not page.open
    shown = " ".join(EVIL.split())
    for section in ("Found images", "Unusable samples", "Configuration", "Environment"):
        assert shown in page.section(section)
    assert "step_<script>" in page.section("Checkpoints")
    assert "|a<b>&|" in page.text
    (source,) = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))
    assert image.size == (7, 5)
    (policy,) = [a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "script" not in policy
    assert not re.search(r'\s(src|href)="(?!data:)', re.sub(r"&lt;.*?&gt;", "", page.html))
    assert "url(" not in page.html


def test_right_pictures_are_told_by_words(tmp_path: Path) -> None:
    def query(caption: str, right: int | None) -> dict[str, Any]:
        pictures = [
            {"caption": f"p{place}", "right": place == right, "similarity": 0.9 - place / 10, "jpeg": jpeg("blue")}
            for place in (1, 2, 3)
        ]
        return {"caption": caption, "pictures": pictures}

    examples = [query("first", 2), query("second", None)]
    run = run_folder(tmp_path / "r", [line(40)], evaluations=[evaluation(40)], examples=examples)
    found = report(run).section("Found images")
    assert "1 of 2 captions found a right image among the nearest 3." in found
    assert "|first|right image in place 2|1|0.800|p1|✓ right|0.700|p2|3|0.600|p3|" in found
    assert "|second|no right image among the nearest 3|1|0.800|" in found
    (run / "evaluation.jsonl").write_text("")  # a run that began again: the examples are of the one before it
    found = report(run).section("Found images")
    assert "of an earlier run" in found
    assert "first" not in found


def test_unusable_samples_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "r", [line(40)])
    assert not report(run).section("Unusable samples")
    bad = [{"sample": i, "key": f"k{i}", "shard": "s.tar", "reason": f"because {i}"} for i in range(203)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(each) + "\n" for each in bad))
    listed = report(run).section("Unusable samples")
    assert "203 samples could not be used" in listed
    assert "|199|k199|s.tar|because 199|and 3 more in quarantine.jsonl" in listed


def test_configuration_shows_differences_first(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path / "r", [line(40)], config=recipe(lr=0.0031, beta1=0.9)))
    different, _, everything = page.section("Configuration").partition("|All ")
    assert "|train.lr|0.0031|0.001|peak learning rate of AdamW|" in different
    assert "|data.train|data/train|required|" in different
    assert "beta1" not in different
    assert "|train.beta1|0.9|0.9|Adam's decay of the first moment|" in everything
    assert '|objectives|[{"name": "contrastive", "weight": 1.0, "label_smoothing": 0.0}]|' in everything


def test_a_key_that_was_found_to_change_nothing_later_is_no_fault_of_a_run(tmp_path: Path) -> None:
    config = recipe().model_copy(update={"data": recipe().data.model_copy(update={"window": 4})})
    assert "<code>data.window</code>" in report(run_folder(tmp_path / "r", [line(40)], config=config)).html


def test_what_is_no_run_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(RequestError, match="nowhere is no run folder: there is no such folder"):
        write_report(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"empty is no run folder: there is no config\.yaml in it"):
        write_report(tmp_path / "empty", out)
    run = run_folder(tmp_path / "r", [line(1)])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RequestError, match=r"there is no metrics\.jsonl in it"):
        write_report(run, out)
    tree = recipe().model_dump(mode="json") | {"trian": 1}
    (run_folder(run, [line(1)]) / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(RequestError, match=r"config\.yaml: unknown key 'trian' \(did you mean 'train'"):
        write_report(run, out)
    assert not out.exists()


def train_in_two_parts(rank: int, world: int, settings: list[str]) -> list[int]:
    from pretrain.train import train

    stops: list[list[str]] = [["train.stop_at=3"], []]
    return [train(load_recipe("quickstart", [*settings, *stop]), "weft train quickstart") for stop in stops]


def test_what_the_trainer_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    """A real run, stopped and resumed."""
    synthesise(tmp_path / "data", train=48, test=21, size=32, sound=False, processes=1)
    settings = [
        *(f"model.{tower}.{each}" for tower in ("vision", "text") for each in ("layers=1", "width=16", "heads=2")),
        "model.vision.image_size=32",
        "model.text.vocab_size=300",
        "train.global_batch=12",
        "train.steps=6",
        "train.warmup=2",
        "train.log_every=2",
        "eval.every=0",
        "data.workers=0",
        f"data.train={tmp_path / 'data' / 'train'}",
        f"data.test={tmp_path / 'data' / 'test'}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert run_ranks(train_in_two_parts, 1, settings) == [[0, 0]]
    page = report(tmp_path / "run")
    assert "|Finished|: trained to step 6." in page.text
    assert "|Samples|72|1.50 epochs|" in page.text
    assert "1 pause left out" in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 8 * 5
    checkpoints = page.section("Checkpoints")
    assert "|step_00000006|latest|72|" in checkpoints
    assert "|step_00000003|36|" in checkpoints
    for section in ("Evaluation", "Speed", "Environment"):
        assert page.section(section)
        assert "–" not in page.section(section)
