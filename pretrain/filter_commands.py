"""`weft data filter`: a data set through filter steps into a new one; `weft data score`: scores for some of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data_output import (
    SHOWN,
    Json,
    Processes,
    ShardKeys,
    path_given,
    place_given,
    plural,
    print_json,
    progress_bar,
    show_more,
)
from pretrain.errors import RequestError
from pretrain.import_commands import Ray

if TYPE_CHECKING:
    from data_pipeline.filters import FilterReport, StepReport


def filter_command(
    # no Path, which would make one slash of the two in a URL
    path: Annotated[str, typer.Argument(parser=place_given, metavar="PATH", help="Folder of shards.")],
    out: Annotated[Path, typer.Argument(parser=path_given, help="New folder for what is kept, and filters.json.")],
    steps: Annotated[
        list[str] | None,
        typer.Option(
            "--steps",
            metavar="FILE.yaml|NAME[:OPTION=VALUE,...]",
            help="A step, or a YAML list of them; several times, in order. Without: what steps there are.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(parser=path_given, metavar="TEST", help="Test set: what duplicates find there leaves PATH."),
    ] = None,
    shard_keys: ShardKeys = False,
    processes: Processes = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Remove duplicates, bad captions, personal data and what scores low; say of each step what it removed and why."""
    from data_pipeline.filters import STEPS, parse_steps, run_filters
    from data_pipeline.filters.parse import step_line
    from data_pipeline.folder import shard_files

    if not steps:
        known = "\n".join(f"  {step_line(step)}" for step in STEPS.values())
        raise ValueError(f"no --steps: give one or more of\n{known}")
    if "://" in path:
        raise ValueError(
            f"{path} is a URL, and filter reads every byte of a folder here: copy it to this machine, and give the copy"
        )
    folder = Path(path)
    parts = [name for name in ("train", "val", "test") if shard_files(folder / name)]
    if parts and not shard_files(folder):
        compare = f", with --against {folder / 'test'} to keep the test set out of it" if "test" in parts else ""
        raise ValueError(f"{folder} holds {len(parts)} data sets: give {folder / parts[0]}{compare}")
    with progress_bar("filtering") as progress:
        report = run_filters(
            folder,
            out,
            parse_steps(step_items(steps)),
            against=against,
            shard_keys=shard_keys,
            processes=processes,
            on=ray,
            progress=progress,
        )
    if as_json:
        print_json({"path": str(out), **report.as_tree()})
    else:
        show_report(out, report)


def step_items(words: Iterable[str]) -> list[Any]:
    """What `--steps` names, in order: a YAML file stands for the list of steps in it.

    Raises FileNotFoundError for a file that is not there, ValueError for one that holds no list.
    """
    from pretrain.recipe_yaml import parse

    items: list[Any] = []
    for word in words:
        if not word.endswith((".yaml", ".yml")):
            items.append(word)
            continue
        if not Path(word).is_file():
            raise FileNotFoundError(f"there is no file of filter steps {word}")
        try:
            tree = parse(Path(word).read_text(encoding="utf-8-sig"), word)
        except RequestError:
            raise
        except ValueError as error:
            raise ValueError(f"{word} is not YAML: {error}") from error
        if not isinstance(tree, list) or not tree:
            raise ValueError(f"{word} holds no list of steps: write lines such as `- captions: {{min_words: 3}}`")
        items += tree
    return items


def score_command(
    checkpoint: Annotated[
        Path, typer.Argument(parser=path_given, metavar="CHECKPOINT", help="A checkpoint, or a run folder.")
    ],
    path: Annotated[Path, typer.Argument(parser=path_given, metavar="PATH", help="Folder of shards.")],
    out: Annotated[Path, typer.Argument(parser=path_given, metavar="OUT.jsonl", help="New file for the table.")],
    classes: Annotated[
        Path | None,
        typer.Option(
            parser=path_given,
            help="Classes: a text file with one a line, or the data set whose labels they are; default: PATH.",
        ),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions/--no-captions", help="Score captions, or pictures alone, which need none.")
    ] = True,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples at once; default: the recipe's eval.batch.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode beside this one.")] = 0,
    as_json: Json = False,
) -> None:
    """Score how well captions fit their images and what the images show, as a table for `weft data filter`."""
    from pretrain.score_samples import score_samples

    with progress_bar("scoring") as progress:
        scored = score_samples(
            checkpoint, path, out, classes=classes, captions=captions, batch=batch, workers=workers, progress=progress
        )
    if as_json:
        print_json({"path": str(out), "rows": scored.rows, "left_out": scored.left_out, "classes": scored.classes})
        return
    print(f"{out}: {plural(scored.rows, 'row')}, {len(scored.classes)} classes")
    for reason, number in scored.left_out.items():
        print(f"  {number:,} left out: {reason}")


def show_report(out: Path, report: FilterReport) -> None:
    """A line for each step, why it removed what it did, and a few of these samples."""
    console = Console(soft_wrap=True)
    table = Table("step", "seen", "removed", "changed", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for step in report.steps:
        table.add_row(escape(step.step), *(f"{number:,}" for number in (step.seen, step.removed, step.changed)))
    console.print(table)
    for step in report.steps:
        _show_step(console, step)
    if report.against_unreadable:
        unreadable = plural(report.against_unreadable, "sample")
        console.print(f"[yellow]{unreadable} of the test set could not be read, and so not be compared[/yellow]")
    kept = f"{report.kept:,} of {plural(report.seen, 'sample')} kept, {report.changed:,} of them changed"
    console.print(f"{escape(str(out))}: {kept}", highlight=False)


def _show_step(console: Console, step: StepReport) -> None:
    if not step.reasons and not step.changes:
        return
    console.print(f"[bold]{escape(step.step)}[/bold]")
    for reason, number in step.reasons.items():
        console.print(escape(f"  {number:,} removed: {reason}"), highlight=False)
    for what, number in step.changes.items():
        console.print(escape(f"  {number:,} changed: {what}"), highlight=False)
    for example in step.examples[:SHOWN]:
        detail = f" ({example.detail})" if example.detail else ""
        console.print(f"  [dim]{escape(f'{example.shard} {example.key}: {example.reason}{detail}')}[/dim]")
    show_more(console, len(step.examples))
