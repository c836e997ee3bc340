"""One HTML page about a run: how it stands, its curves, what it finds, what it was made of.

Design choices:
- The page is made from the run folder alone, so a folder copied from a cluster can be reported anywhere.
- A number that is not in the folder is a dash. Scores stand beside what guessing gives, and count as above it only
  by more than three standard errors, so that a small test set does not flatter.
- Captions, names and reasons are hostile until escaped; `data_pipeline.page` forbids the page scripts and requests.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_pipeline.index import written_whole
from data_pipeline.page import embedded, page, readable_size
from pretrain.checkpoint.format import DESCRIPTION, describe, newest_of
from pretrain.config import Recipe, keys_of
from pretrain.errors import WeftError
from pretrain.metrics import duration
from pretrain.quarantine import QUARANTINE
from pretrain.report_plots import STYLE as PLOT_STYLE
from pretrain.report_plots import Curve, Figure, number_text, smoothed
from pretrain.report_record import RunRecord, Task, Tree, number, read_run
from pretrain.report_style import STYLE
from pretrain.run_folder import divergence

NO_BETTER = 0.98  # of the loss of guessing: a loss above it has taught nothing worth the name
MOST_ROWS = 200  # of unusable samples
DASH = "&ndash;"
WORDS = {"above": "above guessing", "below": "below guessing", "at": "no better than guessing"}
LOOKS = ("first", "second", "third")  # of the curves of a figure


def write_report(run: Path, out: Path) -> Path:
    """Write the page about the run in folder `run` to the file `out`; returns `out`.

    Raises RequestError when `run` is no run folder, and says what is missing in it.
    """
    record = read_run(run)
    name = run.resolve().name
    sections = (_tiles, _learning, _speed, _evaluation, _examples, _unusable, _checkpoints, _settings, _environment)
    body = "\n".join(section(record) for section in sections)
    header = f"<header><h1>{escape(name)}</h1><p>{_verdict(record)}</p></header>"
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as unfinished:
        html = page(f"{name}: run report", PLOT_STYLE + STYLE, f"{header}\n<main>\n{body}\n</main>")
        unfinished.write_text(html, encoding="utf-8", errors="replace")
    return out


def _verdict(record: RunRecord) -> str:
    """How the run stands and whether it learnt anything, in sentences."""
    done, goal, steps = record.done, record.goal, record.recipe.train.steps
    diverged = divergence(record.manifest)
    if not done and not diverged:
        return "No step is logged yet."
    if diverged:
        says = [f"<b>Diverged</b> at step {_escaped(diverged.get('step'))}: {_escaped(diverged.get('why'))}."]
        good = diverged.get("good")
        says += [f"Its last good checkpoint is {_escaped(good)}."] if good else []
    elif done < goal:
        says = [f"<b>Interrupted, or still running</b>: step {done:,} of {goal:,} is the last that is logged."]
        newest = record.newest_checkpoint
        says.append(f"It can go on from step {newest:,}." if newest else "There is no checkpoint to go on from.")
    else:
        asked = f" as train.stop_at asks; its schedule has {steps:,}" if goal < steps else ""
        says = [f"<b>Finished</b>: trained to step {done:,}{asked}."]
    if record.loss_is_not_finite and not diverged:
        says.append("The last logged loss is not finite.")
    if skipped := int(record.last("skipped") or 0):
        says.append(f"{_count(skipped, 'step')} changed nothing and {'was' if skipped == 1 else 'were'} skipped.")
    loss, guess = record.last("loss"), record.guessed_loss()
    if loss is not None and guess is not None and loss > NO_BETTER * guess:
        says.append(f"Its loss, {number_text(loss)}, is no better than guessing.")
    for verdict, words in WORDS.items():
        found = [(task.name, task.latest[task.main]) for task in record.tasks]
        listed = [
            f"{name} {score.name} {_percent(score.value)} (guessing: {_percent(score.guess)})"
            for name, score in found
            if score.verdict == verdict
        ]
        says += [f"{words.capitalize()}: {', '.join(listed)}."] if listed else []
    return " ".join(says)


def _tiles(record: RunRecord) -> str:
    done, seconds = record.done, record.seconds()
    samples, epoch, loss = record.last("samples"), record.last("epoch"), record.last("loss")
    guess, restarts = _guessing(record.guessed_loss()), len(record.starts) - 1
    shown_loss = "not finite" if record.loss_is_not_finite else _text(loss)
    since = "to the last logged step" + (f", {_count(restarts, 'pause')} left out" if restarts > 0 else "")
    facts = [
        _tile("Steps", f"{done:,}", f"of {record.goal:,}", _meter(done / record.goal, None)),
        _tile("Samples", _text(samples), "" if epoch is None else f"{epoch:.2f} epochs"),
        _tile("Time", DASH if seconds is None else duration(seconds), since),
        _tile("Final loss" if done >= record.goal else "Loss so far", shown_loss, "" if guess is None else guess[1]),
    ]
    html = f'<div class="tiles">{"".join(facts)}</div>'
    if not record.tasks:
        return html
    step = f"step {record.evaluated_at[-1]:,.0f}"
    return html + f'<div class="tiles wide">{"".join(_task_tile(task, step) for task in record.tasks)}</div>'


def _tile(name: str, big: str, small: str, extra: str = "") -> str:
    return f'<div class="tile"><h3>{name}</h3><p class="big">{big}</p><p class="small">{small}</p>{extra}</div>'


def _task_tile(task: Task, step: str) -> str:
    columns = "".join(
        f'<div><p class="small">{score.name}</p><p class="big">{_percent(score.value)}</p>'
        f'{_meter(score.value, score.guess)}<p class="small">guessing {_percent(score.guess)}</p></div>'
        for score in task.latest
    )
    verdict = task.latest[task.main].verdict
    pill = f'<span class="pill {verdict}">{WORDS[verdict]}</span>' if verdict else ""
    return f'<div class="tile"><h3>{task.name} <i>{step}</i>{pill}</h3><div class="columns">{columns}</div></div>'


def _meter(value: float | None, guess: float | None) -> str:
    """A bar of a share, with a tick where guessing is."""
    tick = "" if guess is None else f'<i style="left:{min(guess, 1):.2%}"></i>'
    return f'<div class="meter"><b style="width:{min(value or 0, 1):.2%}"></b>{tick}</div>'


def _learning(record: RunRecord) -> str:
    if not record.steps:
        return ""
    train, objectives = record.recipe.train, record.recipe.objectives
    norms = [norm for _, norm in record.series("grad_norm") if norm is not None]
    spread = bool(norms) and 0 < 50 * min(norms) < max(norms)
    clipped = bool(norms) and 0 < train.grad_clip < max(norms)
    figures = [_figure(record, "Loss", "loss", smooth=True, level=_guessing(record.guessed_loss()))]
    for objective in objectives if len(objectives) > 1 else ():
        level = _guessing(math.log(train.global_batch) if objective.name == "contrastive" else None)
        title = f"Loss of {objective.name}, unweighted"
        figures.append(_figure(record, title, f"loss_{objective.name}", smooth=True, level=level))
    clip = (train.grad_clip, f"clipped above {train.grad_clip:g}") if clipped else None
    figures += [
        _figure(record, "Gradient norm before clipping", "grad_norm", smooth=True, log=spread, level=clip),
        _figure(record, "Learning rate", "lr", from_zero=True),
        _figure(record, "Logit scale", "logit_scale"),
    ]
    return _section("Learning", f'<div class="figures large">{"".join(figures)}</div>')


def _guessing(loss: float | None) -> tuple[float, str] | None:
    return None if loss is None else (loss, f"guessing: {loss:.3f}")


def _speed(record: RunRecord) -> str:
    if not record.steps:
        return ""
    # medians, because the first stretch of a run holds its warming up
    speed, tflops, mfu, wait = (record.median(name) for name in ("samples_per_s", "tflops", "mfu", "data_wait"))
    facts = {
        "samples a second": _text(speed),
        "TFLOP/s a rank": _text(tflops),
        "of the device's peak (MFU)": "not known for this device" if mfu is None else f"{mfu:.1%}",
        "of the time waiting for data": _percent(wait),
        "GiB peak memory of a rank": _text(record.last("memory_gib")),
    }
    shown = "".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for name, value in facts.items())
    figures = [
        _figure(record, "Samples a second", "samples_per_s", smooth=True, from_zero=True),
        _figure(record, "Time spent waiting for data", "data_wait", smooth=True, from_zero=True, percent=True),
        _figure(record, "Peak memory of a rank, GiB", "memory_gib", from_zero=True),
    ]
    note = '<p class="small">Medians over the logged steps; memory: the last logged.</p>'
    return _section("Speed", f'{note}<dl class="facts">{shown}</dl><div class="figures">{"".join(figures)}</div>')


def _figure(record: RunRecord, title: str, name: str, *, smooth: bool = False, **options: Any) -> str:
    """A number of the metrics over the steps, with the places where the run was resumed."""
    marks = {
        step: f"resumed from step {step:,.0f}, {_date(number(start, 'time'))}"
        for start in record.starts
        if (step := number(start, "step"))
    }
    points = record.series(name)
    mean, width = smoothed(points) if smooth else ([], 1)
    if width > 1:
        curves = [Curve("each logged step", points, "faint"), Curve(f"mean of {width} neighbours", mean)]
    else:
        curves = [Curve("each logged step", points)]
    return Figure(title, curves, marks=marks, **options).svg()


def _evaluation(record: RunRecord) -> str:
    if not record.evaluations:
        every = record.recipe.eval.every
        why = "data.test is not set" if record.recipe.data.test is None else f"none is logged; eval.every is {every}"
        return _section("Evaluation", f'<p class="none">No evaluation: {why}.</p>')
    figures, heads, rows = [], ["step"], [[f"{step:,.0f}"] for step in record.evaluated_at]
    for task in record.tasks:
        curves = []
        for column, look in zip(zip(*task.history, strict=True), LOOKS, strict=False):
            heads.append(f"{task.name} {column[0].name}")
            values = [score.value for score in column]
            curves.append(Curve(column[0].name, list(zip(record.evaluated_at, values, strict=True)), look))
            for row, value in zip(rows, values, strict=True):
                row.append(_percent(value))
        main = task.latest[task.main]
        level = None if main.guess is None else (main.guess, f"guessing {main.name}")
        figures.append(Figure(task.name, curves, percent=True, from_zero=True, level=level).svg())
    table = _table(heads, rows[::-1])
    if len(rows) > 1:  # one dot tells nothing
        table = f"<details><summary>All {len(rows)} evaluations</summary>{table}</details>"
        table = f'<div class="figures">{"".join(figures)}</div>{table}'
    problem, notes = record.told_of_test_set
    told = [f"<b>The scores mean nothing: {escape(problem)}.</b>"] if problem else []
    told += [escape(note[:1].upper() + note[1:]) + "." for note in [_protocol(record), *notes] if note]
    lines = "".join(f'<p class="small">{line}</p>' for line in told)
    return _section("Evaluation", lines + table)


def _protocol(record: RunRecord) -> str:
    """What retrieval is scored over, in the last evaluation."""
    images, captions = (number(record.evaluations[-1], "retrieval", name) for name in ("images", "captions"))
    if images is None or captions is None:
        return ""
    return (
        f"retrieval among {_count(int(images), 'image')} and all their {_count(int(captions), 'caption')}: "
        "image to text is right when any of the image's own captions is among the first K"
    )


def _examples(record: RunRecord) -> str:
    if not record.examples:
        return ""
    if not record.evaluations:  # examples.json outlives a run that begins again in the same folder
        return _section("Found images", '<p class="none">examples.json is of an earlier run in this folder.</p>')
    queries, hits, shown = [], 0, 0
    for example in record.examples:
        listed = example.get("pictures")
        pictures = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        right = next((place for place, each in enumerate(pictures, 1) if each.get("right") is True), 0)
        hits, shown = hits + (right > 0), max(shown, len(pictures))
        result = f"right image in place {right}" if right else f"no right image among the nearest {len(pictures)}"
        found = "".join(_found(place, each) for place, each in enumerate(pictures, 1))
        queries.append(
            f'<article><h3 dir="auto">{escape(str(example.get("caption", "")))}</h3>'
            f'<p class="small">{result}</p><ol>{found}</ol></article>'
        )
    note = (
        f'<p class="small">Captions of the test data, and the images nearest to each, nearest first. {hits} of '
        f"{_count(len(queries), 'caption')} found a right image among the nearest {shown}.</p>"
    )
    return _section("Found images", f'{note}<div class="queries">{"".join(queries)}</div>')


def _found(place: int, picture: Tree) -> str:
    similarity, right = number(picture, "similarity"), picture.get("right") is True
    score = DASH if similarity is None else f"{similarity:.3f}"
    rank = "&check; right" if right else str(place)
    return (
        f'<li class="{"right" if right else "wrong"}">{_thumbnail(picture.get("jpeg"))}'
        f'<p class="small score"><b>{rank}</b> <span title="cosine similarity">{score}</span></p>'
        f'<p class="small caption" dir="auto">{escape(str(picture.get("caption", "")))}</p></li>'
    )


def _thumbnail(text: Any) -> str:
    try:
        data = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data.startswith(b"\xff\xd8"):
        return '<span class="none">no image</span>'
    return f'<img src="{embedded("image/jpeg", data)}" alt="">'


def _unusable(record: RunRecord) -> str:
    if not record.unusable:
        return ""
    rows = [[_escaped(line.get(name)) for name in ("sample", "key", "shard", "reason")] for line in record.unusable]
    rest = len(rows) - MOST_ROWS
    more = f'<p class="small">and {rest:,} more in {QUARANTINE}</p>' if rest > 0 else ""
    note = f'<p class="small">{_count(len(rows), "sample")} could not be used; others stood in.</p>'
    return _section(
        "Unusable samples", note + _table(["sample", "key", "shard", "reason"], rows[:MOST_ROWS], "prose") + more
    )


def _checkpoints(record: RunRecord) -> str:
    folder = record.folder / "checkpoints"
    found_newest = newest_of(folder)
    newest = found_newest.name if found_newest else ""
    rows = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        name = escape(path.name) + (" <b>latest</b>" if path.name == newest else "")
        try:
            found = describe(path)
        except WeftError as error:
            rows.append([name, f'<span class="bad">{escape(str(error))}</span>', DASH, DASH, DASH])
            continue
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        written = _date((path / DESCRIPTION).stat().st_mtime)
        rows.append([name, f"{found.samples:,}", f"{found.parameter_count / 1e6:.2f} M", readable_size(size), written])
    if not rows:
        return _section("Checkpoints", '<p class="none">There is none in this folder.</p>')
    return _section("Checkpoints", _table(["checkpoint", "samples", "parameters", "size", "written"], rows))


def _settings(record: RunRecord) -> str:
    changed, everything = [], []
    for key, field in keys_of(Recipe):
        value: Any = record.recipe
        for part in key.split("."):
            value = getattr(value, part)
        if isinstance(value, BaseModel):
            continue
        default = None if field.is_required() else _value(field.get_default(call_default_factory=True))
        row = [f"<code>{key}</code>", _value(value), default or "required", _escaped(field.description)]
        everything.append(row)
        if _value(value) != default:
            changed.append(row)
    heads = ["key", "value", "default", "meaning"]
    return _section(
        "Configuration",
        '<p class="small">What differs from the defaults:</p>'
        + _table(heads, changed, "prose")
        + f"<details><summary>All {len(everything)} keys</summary>{_table(heads, everything, 'prose')}</details>",
    )


def _environment(record: RunRecord) -> str:
    manifest = record.manifest
    if not manifest:
        return _section("Environment", '<p class="none">manifest.json is missing, or not whole.</p>')
    facts = {"code": "code revision", "machine": "machine", "world": "ranks", "seed": "seed"}
    rows = [[label, _escaped(manifest.get(name))] for name, label in facts.items()]
    rows.append(["data fingerprint", _escaped(manifest.get("data_fingerprint"))])
    versions = manifest.get("versions")
    if isinstance(versions, dict):
        listed = ", ".join(f"{_escaped(name)} {_escaped(version)}" for name, version in versions.items())
        rows.append(["versions", listed])
    starts = [
        [_date(number(start, "time")), _escaped(start.get("step")), _escaped(start.get("layout"))]
        for start in record.starts
    ]
    body = _table([], rows, "prose")
    if starts:
        body += f"<h3>{_count(len(starts), 'start')}</h3>" + _table(["when", "from step", "layout"], starts, "prose")
    return _section("Environment", body)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Cells are HTML; a table of numbers scrolls when it is too wide, one of prose becomes a list on a phone."""
    head = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in heads)}</tr></thead>" if heads else ""
    names = [f' data-head="{name}"' for name in heads[1:]]
    body = "".join(
        "<tr>"
        + "".join(f"<td{name}>{cell}</td>" for name, cell in zip_longest(["", *names], row, fillvalue=""))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _value(value: Any) -> str:
    """A setting as escaped text: strings and paths as they are, the rest as JSON."""
    if isinstance(value, str | Path):
        return escape(str(value))
    return escape(json.dumps(value, default=lambda each: each.model_dump(mode="json"), ensure_ascii=False))


def _escaped(value: Any) -> str:
    return DASH if value is None else escape(str(value))


def _text(value: float | None) -> str:
    return DASH if value is None else number_text(value)


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def _date(time: float | None) -> str:
    return DASH if time is None else datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
