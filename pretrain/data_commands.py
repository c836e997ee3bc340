"""`weft data`: make, import, check, count, look at and order data sets.

Design choices:
- A PATH is a folder of shards, or the parent of train/ and test/: then the command does both and says which is which.
- With --json, exactly one JSON object on stdout; progress goes to stderr, and only to a terminal.
- Exit 1 when the data is bad. Other errors rise to `pretrain.cli.main`, which prints them and knows their exit codes.
- `data_pipeline` loads torch and is imported inside the commands, so that `weft --help` is quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from data_pipeline.check import CheckReport
    from data_pipeline.importers.split import Imported
    from data_pipeline.shards import Written
    from data_pipeline.stats import DatasetStats, Spread

SHOWN = 12  # problems, skipped sources or bars on a screen; --json has all
BAR = 24  # characters of the longest bar of a histogram

data = typer.Typer(
    name="data", help="Make, import, check and look at data sets.", no_args_is_help=True, pretty_exceptions_enable=False
)
importers = typer.Typer(
    help="Turn pictures and captions into shards: OUT/train and OUT/test.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data.add_typer(importers, name="import")

Out = Annotated[Path, typer.Argument(help="New folder; gets the sub-folders train and test.")]
DataPath = Annotated[Path, typer.Argument(metavar="PATH", help="Folder of shards, or the parent of train/ and test/.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Processes = Annotated[int | None, typer.Option(min=0, help="Processes at work; default: one a core.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn by chance.")]
TestShare = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the samples that goes to OUT/test; 0: no test set.")
]
Sound = Annotated[bool, typer.Option("--sound/--no-sound", help="With the sound, or pictures and captions only.")]


@data.command()
def synth(
    out: Out,
    train: Annotated[int, typer.Option(min=1, help="Samples in OUT/train.")] = 16384,
    test: Annotated[int, typer.Option(min=1, help="Samples in OUT/test: attribute combinations train lacks.")] = 1024,
    seed: Seed = 0,
    size: Annotated[int, typer.Option(min=1, help="Side of a picture, pixels.")] = 64,
    sound: Sound = True,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Draw scenes of coloured shapes with captions, labels and tones that say what is there."""
    from data_pipeline.scenes.synth import synthesise

    with progress_bar("drawing") as progress:
        written = synthesise(
            out, train=train, test=test, seed=seed, size=size, sound=sound, processes=processes, progress=progress
        )
    _show_written(out, *written, as_json)


@importers.command("folder")
def import_folder_command(
    path: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    out: Out,
    test_share: TestShare = 0.1,
    seed: Seed = 0,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Import a folder of pictures with a .txt of the same name beside each, or one folder a class."""
    from data_pipeline.importers.folder import import_folder

    with progress_bar("importing") as progress:
        imported = import_folder(path, out, test_share=test_share, seed=seed, processes=processes, progress=progress)
    _show_imported(out, imported, as_json)


@importers.command("table")
def import_table_command(
    file: Annotated[Path, typer.Argument(help="The table.")],
    out: Out,
    image_column: Annotated[str | None, typer.Option(help="Column of the pictures; default: found by name.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the captions; default: found by name.")] = None,
    test_share: TestShare = 0.1,
    seed: Seed = 0,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Import a table (CSV, TSV or Parquet) with a column of pictures and one of captions."""
    from data_pipeline.importers.table import import_table

    with progress_bar("importing") as progress:
        imported = import_table(
            file,
            out,
            image_column=image_column,
            caption_column=caption_column,
            test_share=test_share,
            seed=seed,
            processes=processes,
            progress=progress,
        )
    _show_imported(out, imported, as_json)


@importers.command("tuxpaint")
def import_tuxpaint_command(
    out: Out,
    language: Annotated[str, typer.Option(help="Language of captions and speech: en, de, ja, ...")] = "en",
    test_share: TestShare = 0.2,
    seed: Seed = 0,
    package: Annotated[
        Path | None, typer.Option(help="The .deb of tuxpaint-stamps-default; default: downloaded.")
    ] = None,
    sound: Sound = True,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Import the stamps of Tux Paint (Debian, GPL-2): real pictures with captions and spoken descriptions."""
    from data_pipeline.importers.tuxpaint import import_tuxpaint

    with progress_bar("importing") as progress:
        imported = import_tuxpaint(
            out,
            language=language,
            test_share=test_share,
            seed=seed,
            package=package,
            sound=sound,
            processes=processes,
            progress=progress,
        )
    _show_imported(out, imported, as_json)


@data.command()
def check(
    path: DataPath,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every picture and sound, too.")] = True,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Read everything and name every defect: shard, byte, key and reason. Exit 1 when there is an error."""
    from data_pipeline.check import check_dataset

    reports: dict[str, CheckReport] = {}
    for folder in datasets_in(path):
        with progress_bar(f"checking {folder}") as progress:
            reports[str(folder)] = check_dataset(folder, decode=decode, processes=processes, progress=progress)
    ok = all(report.ok for report in reports.values())
    if as_json:
        found = [{"path": name, "ok": report.ok, **asdict(report)} for name, report in reports.items()]
        print_json({"ok": ok, "datasets": found})
    else:
        for name, report in reports.items():
            _show_report(name, report)
    if not ok:
        raise typer.Exit(1)


@data.command()
def stats(
    path: DataPath,
    samples: Annotated[int, typer.Option(min=1, help="At most so many samples are opened, spread evenly.")] = 2000,
    as_json: Json = False,
) -> None:
    """Count samples, bytes and modalities; lengths of captions, sizes of pictures, balance of shards."""
    from data_pipeline.stats import dataset_stats

    found = {str(folder): dataset_stats(folder, sample_limit=samples) for folder in datasets_in(path)}
    if as_json:
        print_json({"datasets": [{"path": name, **asdict(counted)} for name, counted in found.items()]})
    else:
        for name, counted in found.items():
            _show_stats(name, counted)


@data.command()
def preview(
    path: DataPath,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: PATH/preview.html.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 48,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write a contact sheet: one HTML file with pictures, captions, labels and sound, nothing outside it needed."""
    from data_pipeline.preview import write_preview

    folders = datasets_in(path)
    files: dict[str, str] = {}
    for folder in folders:
        file = out or folder / "preview.html"
        if out and len(folders) > 1:
            file = out.with_name(f"{out.stem}-{folder.name}{out.suffix}")
        write_preview(folder, file, count=count, seed=seed)
        files[str(folder)] = str(file)
    if as_json:
        print_json({"datasets": [{"path": name, "file": sheet} for name, sheet in files.items()]})
    else:
        for name, sheet in files.items():
            print(f"{name}: {sheet}")


@data.command()
def order(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of shards.")],
    seed: Annotated[int, typer.Option(help="Seed of the order; a run's is run.seed.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch to start in, from 0.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First place within that epoch, from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many; goes on into the next epochs.")] = 10,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="As in training, or as the shards lie.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Print which samples a run reads at any stretch of its order."""
    from data_pipeline.order import Order
    from data_pipeline.reader import open_dataset, read_order

    folders = datasets_in(path)
    if folders != [path]:
        raise ValueError(f"{path} holds {len(folders)} data sets, each with its own order: give {folders[0]}")
    dataset = open_dataset(path)
    if start >= len(dataset):
        raise ValueError(f"--start is {start}, but an epoch of {path} has places 0 to {len(dataset) - 1}")
    run_order = Order(len(dataset), seed, shuffle)
    rows = read_order(dataset, run_order, epoch * len(dataset) + start, count)
    if as_json:
        head = {"path": str(path), "fingerprint": dataset.fingerprint, "samples": len(dataset)}
        print_json({**head, "seed": seed, "shuffle": shuffle, "rows": rows})
        return
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:  # no rich table: it would cut long keys to the width of the terminal
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def datasets_in(path: Path) -> list[Path]:
    """The data sets that `path` means: itself, or its train/ and test/; FileNotFoundError when there is none."""
    from data_pipeline.index import INDEX_FILE, shard_files

    def holds_data(folder: Path) -> bool:
        return folder.is_dir() and (bool(shard_files(folder)) or (folder / INDEX_FILE).is_file())

    if not path.exists():
        raise FileNotFoundError(f"no data set at {path}: there is no such folder")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the folder that holds the shards")
    if holds_data(path):
        return [path]
    folders = [path / name for name in ("train", "test") if holds_data(path / name)]
    if folders:
        return folders
    compressed = next(iter(sorted([*path.glob("*.tar.*"), *path.glob("*.tgz")])), None)
    hint = f"; {compressed.name} is compressed, and only plain .tar can be read at any place" if compressed else ""
    raise FileNotFoundError(f"no data set at {path}: no .tar in it, and none in train/ or test/{hint}")


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal; gives the function that moves it: (done, total)."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(tree: dict[str, Any]) -> None:
    """One JSON object on stdout, ASCII only, so that no terminal or hostile text can break it."""
    print(json.dumps(tree))


def _show_imported(out: Path, imported: Imported, as_json: bool) -> None:
    _show_written(out, imported.train, imported.test, as_json)


def _show_written(out: Path, train: Written, test: Written | None, as_json: bool) -> None:
    from data_pipeline.page import readable_size

    parts = {"train": train} | ({"test": test} if test else {})
    if as_json:
        tree = {name: _written_tree(out / name, written) for name, written in parts.items()}
        print_json({"path": str(out), "train": tree["train"], "test": tree.get("test")})
        return
    console = Console(soft_wrap=True)
    for name, written in parts.items():
        index = written.index
        size = readable_size(sum(shard.bytes for shard in index.shards))
        console.print(escape(f"{out / name}: {index.samples} samples in {_count(len(index.shards), 'shard')}, {size}"))
        if written.skipped:
            console.print(f"[yellow]skipped {len(written.skipped)}:[/yellow]")
        for skip in written.skipped[:SHOWN]:
            console.print(escape(f"  {skip.source}: {skip.reason}"))
        _show_more(console, len(written.skipped))


def _written_tree(folder: Path, written: Written) -> dict[str, Any]:
    index = written.index
    return {
        "path": str(folder),
        "samples": index.samples,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "fingerprint": index.fingerprint,
        "skipped": [asdict(skip) for skip in written.skipped],
    }


def _show_report(folder: str, report: CheckReport) -> None:
    console = Console(soft_wrap=True)
    for problem in sorted(report.problems, key=lambda problem: problem.severity != "error")[:SHOWN]:
        colour = "red" if problem.severity == "error" else "yellow"
        console.print(f"[{colour}]{problem.severity}[/{colour}] {escape(str(problem))}", highlight=False)
    _show_more(console, len(report.problems))
    verdict = "[green]good[/green]" if report.ok else "[red]bad[/red]"
    errors, warnings = len(report.errors), len(report.problems) - len(report.errors)
    console.print(
        f"{escape(folder)}: {verdict}, {_count(report.samples, 'sample')} in {_count(report.shards, 'shard')}, "
        f"{_count(errors, 'error')}, {_count(warnings, 'warning')}",
        highlight=False,
    )


def _show_stats(folder: str, counted: DatasetStats) -> None:
    from data_pipeline.page import readable_size

    console = Console()
    facts = Table(title=escape(folder), title_justify="left", title_style="bold", box=None, show_header=False)
    facts.add_row(
        "samples", f"{counted.samples:,} in {_count(counted.shards, 'shard')}, {readable_size(counted.bytes)}"
    )
    facts.add_row("a shard", f"{_range(counted.shard_samples)} samples, {_range(counted.shard_bytes, readable_size)}")
    facts.add_row("opened", f"{_count(counted.opened, 'sample')}, {counted.unreadable} not fully readable")
    holding = (f"{name} {_share(number, counted.opened)}" for name, number in counted.modalities.items())
    facts.add_row("holding", ", ".join(holding) or "neither picture, text nor sound")
    labels = f", {_count(len(counted.labels), 'label')}" if counted.labels else ""
    facts.add_row("labelled", f"{_share(counted.labelled, counted.opened)}{labels}")
    spreads = {
        "captions a sample": counted.captions_per_sample,
        "characters a caption": counted.caption_characters,
        "words a caption": counted.caption_words,
        "pixels of the shorter side": counted.image_side,
        "seconds of sound": counted.sound_seconds,
    }
    for title, spread in spreads.items():
        if spread.count:
            facts.add_row(title, f"{_range(spread, _short)}, mean {_short(spread.mean)}")
    console.print(facts)
    for title, spread in spreads.items():
        if len(spread.counts) > 1:
            bins = zip(spread.low, spread.high, strict=True)
            names = [_short(low) if low == high else f"{_short(low)} to {_short(high)}" for low, high in bins]
            _show_bars(console, title, dict(zip(names, spread.counts, strict=True)), spread.count)
    _show_bars(console, "sizes of pictures", counted.image_sizes, counted.image_side.count)
    _show_bars(console, "labels", counted.labels, counted.labelled)


def _show_bars(console: Console, title: str, counts: dict[str, int], total: int) -> None:
    """A bar for each of the counts, the first SHOWN of them."""
    if not counts:
        return
    table = Table(box=None, show_header=False)
    table.add_column(justify="right", max_width=40, no_wrap=True)
    for name, number in list(counts.items())[:SHOWN]:
        length = round(BAR * number / max(counts.values()))
        table.add_row(escape(name), "█" * length or "·", f"{number:,}", f"[dim]{_share(number, total)}[/dim]")
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
    _show_more(console, len(counts))


def _show_more(console: Console, total: int) -> None:
    if total > SHOWN:
        console.print(f"  ... and {total - SHOWN} more: --json lists all", highlight=False)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) else f"{number:.3g}"


def _range(spread: Spread, name: Callable[[float], str] = _short) -> str:
    if spread.smallest == spread.largest:
        return name(spread.smallest)
    return f"{name(spread.smallest)} to {name(spread.largest)}"


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "-"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
