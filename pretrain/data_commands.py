"""`weft data`: make, check, count, look at and order data sets (import_commands.py, filter_commands.py).

Design choices:
- A PATH is a folder of shards, or the parent of train/ and test/: then the command does both and says which is which.
  Parquet is read as it lies, a URL by `stats` and `order`.
- Exit 1 when the data is bad. Other errors rise to `pretrain.cli.main`, which prints them and knows their exit codes.
- `data_pipeline` loads torch and is imported inside the commands, so that `weft --help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data_output import (
    SHOWN,
    Json,
    Out,
    Processes,
    Seed,
    ShardKeys,
    Sound,
    path_given,
    place_given,
    plural,
    print_json,
    progress_bar,
    show_more,
    show_written,
    written_tree,
)
from pretrain.filter_commands import filter_command, score_command
from pretrain.import_commands import importers

if TYPE_CHECKING:
    from data_pipeline.check import CheckReport
    from data_pipeline.shards import Written
    from data_pipeline.stats import DatasetStats, Spread

BAR = 24  # characters of the longest bar of a histogram

data = typer.Typer(
    name="data", help="Make, import, check and look at data sets.", no_args_is_help=True, pretty_exceptions_enable=False
)
data.add_typer(importers, name="import")
data.command("filter")(filter_command)
data.command("score")(score_command)


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
    show_written(out, dict(zip(("train", "test"), written, strict=True)), as_json)


@data.command()
def bake(
    # no Path, which would make one slash of the two in a URL
    path: Annotated[
        str, typer.Argument(parser=place_given, metavar="IN", help="As data.train, or the parent of train/ and test/.")
    ],
    out: Annotated[
        Path, typer.Argument(parser=path_given, help="New folder; gets train/ and test/ where IN has them.")
    ],
    short_side: Annotated[int, typer.Option(min=1, help="Short side of the resized images, pixels.")] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the resized images.")] = 90,
    shard_keys: ShardKeys = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Copy a data set with its images resized once, so that training decodes fewer pixels.

    Images that are no larger are kept as they are. Everything else of a sample is kept; its json says what it was.
    Training refuses what needs larger images. The same command resumes what was interrupted.
    """
    from data_pipeline.bake import bake as bake_dataset

    places: list[str | Path] = [path] if "://" in path else list(datasets_in(Path(path)))
    written: dict[str, Written] = {}
    for place in places:
        name = Path(place).name if len(places) > 1 or str(place) != path.rstrip("/") else "."
        with progress_bar(f"baking {place}") as progress:
            written[name] = bake_dataset(
                place,
                out / name,
                short_side=short_side,
                quality=quality,
                shard_keys=shard_keys,
                processes=processes,
                progress=progress,
            )
    if as_json:
        print_json({"datasets": [written_tree(out / name, part) for name, part in written.items()]})
    else:
        show_written(out, written, as_json=False)


@data.command()
def check(
    path: Annotated[
        str, typer.Argument(parser=place_given, metavar="PATH", help="Folder of tars, Parquet, or their parent.")
    ],
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every picture and sound, too.")] = True,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to split over: is it even?")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Workers of each rank, likewise.")] = 1,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Read everything and name every defect: shard, byte, key and reason. Exit 1 when there is an error.

    With --ranks or --workers, also how samples fall to them.
    """
    from data_pipeline.check import check_dataset

    reports: dict[str, CheckReport] = {}
    for folder in _folders_to_check(path):
        with progress_bar(f"checking {folder}") as progress:
            reports[str(folder)] = check_dataset(folder, decode=decode, processes=processes, progress=progress)
    ok = all(report.ok for report in reports.values())
    splits = {name: _split(Path(name), ranks, workers) for name in reports} if ok and ranks * workers > 1 else {}
    if as_json:
        found = [
            {"path": name, "ok": report.ok, **asdict(report), **({"split": splits[name]} if splits else {})}
            for name, report in reports.items()
        ]
        print_json({"ok": ok, "datasets": found})
    else:
        for name, report in reports.items():
            _show_report(name, report)
            if splits:
                print(f"{name}: {splits[name]['words']}")
    if not ok:
        raise typer.Exit(1)


@data.command()
def stats(
    # no Path, which would make one slash of the two in a URL
    path: Annotated[
        str,
        typer.Argument(parser=place_given, metavar="PATH", help="As data.train, or the parent of train/ and test/."),
    ],
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Count at most so many samples, spread evenly; default: all where the index tells."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count samples, bytes and modalities; show caption lengths, image sizes and shard balance."""
    from data_pipeline.stats import dataset_stats

    places = [path] if "://" in path else datasets_in(Path(path))
    found = {str(place): dataset_stats(place, sample_limit=samples) for place in places}
    if as_json:
        print_json({"datasets": [{"path": name, **asdict(counted)} for name, counted in found.items()]})
    else:
        for name, counted in found.items():
            _show_stats(name, counted)


@data.command()
def preview(
    path: Annotated[
        str,
        typer.Argument(parser=place_given, metavar="PATH", help="Folder of shards, or the parent of train/ and test/."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path_given, help="HTML file to write; default: PATH/preview.html."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 48,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write a contact sheet: one self-contained HTML file with images, captions, labels and sound."""
    from data_pipeline.preview import write_preview

    if "://" in path:
        raise ValueError(
            f"{path} is a URL, and preview draws samples of a folder on this machine: `weft data stats {path}` counts "
            "what some of them hold; to see them, copy some shards here"
        )
    folders = datasets_in(Path(path))
    files: dict[str, str] = {}
    for folder in folders:
        file = out or (folder if folder.is_dir() else folder.parent) / "preview.html"
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
    path: Annotated[
        str, typer.Argument(parser=place_given, metavar="PATH", help="Folder of shards, or a URL, as data.train.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of the order; a run's is run.seed.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch to start in, from 0.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First place within that epoch, from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Number of samples; continues into the next epochs.")] = 10,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="In training order, or in stored order.")
    ] = True,
    block: Annotated[int, typer.Option(min=0, help="As data.block of a recipe; 0: a full shuffle.")] = 0,
    window: Annotated[int, typer.Option(min=1, help="As data.window.")] = 64,
    quality: Annotated[
        int, typer.Option(min=0, help="Measure how well batches of this size are mixed, and what reading them costs.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Print which samples a run reads at any stretch of its order; or, with --quality, how good that order is."""
    from data_pipeline.block_order import BlockOrder, quality_of
    from data_pipeline.errors import printable
    from data_pipeline.order import LARGEST, Order
    from data_pipeline.reader import open_dataset, read_order

    if "://" not in path:
        folders = datasets_in(Path(path))
        if folders != [Path(path).expanduser()]:
            raise ValueError(f"{path} holds {len(folders)} data sets, each with its own order: give {folders[0]}")
    dataset = open_dataset(path)
    if start >= len(dataset):
        raise ValueError(f"--start is {start}, but an epoch of {path} has places 0 to {len(dataset) - 1}")
    run_order = BlockOrder(len(dataset), seed, block, window) if block else Order(len(dataset), seed, shuffle)
    if quality:
        measured = quality_of(run_order, dataset, batch=quality)
        if as_json:
            print_json({"path": str(path), "block": block, "window": window, **measured.as_dict()})
        else:
            print(measured)
        return
    first = epoch * len(dataset) + start
    if first + count > LARGEST:
        raise ValueError(
            f"--epoch {epoch} with --count {count} goes to position {first + count - 1}, and positions stay below "
            "2^62: give an earlier epoch, or fewer"
        )
    rows = read_order(dataset, run_order, first, count)
    if as_json:
        head = {"path": str(path), "fingerprint": dataset.fingerprint, "samples": len(dataset)}
        print_json({**head, "seed": seed, "shuffle": shuffle, "block": block, "rows": rows})
        return
    lines = [list(rows[0]), *([printable(str(value)) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:  # no rich table: it would cut long keys to the width of the terminal
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def datasets_in(path: Path) -> list[Path]:
    """The data sets that `path` means: itself, or its train/ and test/; FileNotFoundError when there is none."""
    from data_pipeline.folder import hint_of_pattern, shard_files
    from data_pipeline.index import INDEX_FILE
    from data_pipeline.parquet import is_parquet

    def holds_data(folder: Path) -> bool:
        tars = folder.is_dir() and (bool(shard_files(folder)) or (folder / INDEX_FILE).is_file())
        return tars or is_parquet(folder)

    path = path.expanduser()
    if is_parquet(path):
        return [path]
    if not path.is_dir():
        what = "it is a file, not a folder of shards" if path.exists() else "there is no such folder"
        raise FileNotFoundError(f"no data set at {path}: {what}{hint_of_pattern(str(path))}")
    if holds_data(path):
        return [path]
    folders = [path / name for name in ("train", "val", "test") if holds_data(path / name)]
    if folders:
        return folders
    compressed = next(iter(sorted([*path.glob("*.tar.*"), *path.glob("*.tgz")])), None)
    hint = f"; {compressed.name} is compressed, and only plain .tar can be read at any place" if compressed else ""
    raise FileNotFoundError(f"no data set at {path}: no .tar in it, and none in train/ or test/{hint}")


def _folders_to_check(path: str) -> list[Path]:
    """The data sets in `path`; ValueError for what `weft data check` cannot check."""
    if "://" in path:
        raise ValueError(
            f"{path} is a URL, and check reads every byte of a folder on this machine: `weft data stats {path}` opens "
            "some of its samples, and training holds each field that it reads against its checksum"
        )
    return datasets_in(Path(path))


def _split(folder: Path, ranks: int, workers: int) -> dict[str, Any]:
    """How samples fall to ranks and workers, by weft's order and by whole shards."""
    from data_pipeline.index import shares_by_shard
    from data_pipeline.reader import open_dataset

    index = open_dataset(folder).index
    shares = shares_by_shard(index, ranks, workers)
    by_rank, by_worker = [sum(share) for share in shares], [count for share in shares for count in share]
    words = (
        f"weft reads the same number on each of {plural(ranks, 'rank')}, whatever the shards hold; loaders that deal "
        f"out whole shards, as webdataset's do, would give {min(by_rank)} to {max(by_rank)} samples to a rank and "
        f"{min(by_worker)} to {max(by_worker)} to a worker"
    )
    if min(by_worker) == 0:
        words += f", and nothing to some: {plural(len(index.shards), 'shard')} for {ranks * workers} workers"
    return {"by_shard": shares, "even_by_shard": min(by_worker) == max(by_worker), "words": words}


def _show_report(folder: str, report: CheckReport) -> None:
    from data_pipeline.errors import printable

    console = Console(soft_wrap=True)
    for problem in sorted(report.problems, key=lambda problem: problem.severity != "error")[:SHOWN]:
        colour = "red" if problem.severity == "error" else "yellow"
        console.print(f"[{colour}]{problem.severity}[/{colour}] {escape(printable(str(problem)))}", highlight=False)
    show_more(console, len(report.problems))
    verdict = "[green]good[/green]" if report.ok else "[red]bad[/red]"
    errors, warnings = len(report.errors), len(report.problems) - len(report.errors)
    console.print(
        f"{escape(folder)}: {verdict}, {plural(report.samples, 'sample')} in {plural(report.shards, 'shard')}, "
        f"{plural(errors, 'error')}, {plural(warnings, 'warning')}",
        highlight=False,
    )


def _show_stats(folder: str, counted: DatasetStats) -> None:
    from data_pipeline.errors import printable
    from data_pipeline.page import readable_size

    console = Console()
    facts = Table(title=escape(folder), title_justify="left", title_style="bold", box=None, show_header=False)
    facts.add_row(
        "samples", f"{counted.samples:,} in {plural(counted.shards, 'shard')}, {readable_size(counted.bytes)}"
    )
    facts.add_row("a shard", f"{_range(counted.shard_samples)} samples, {_range(counted.shard_bytes, readable_size)}")
    facts.add_row("opened", f"{plural(counted.opened, 'sample')}, {counted.unreadable} not fully readable")
    holding = (f"{name} {_share(number, counted.opened)}" for name, number in counted.modalities.items())
    facts.add_row("holding", ", ".join(holding) or "neither picture, text nor sound")
    for remark in counted.remarks:
        facts.add_row("[yellow]note[/yellow]", escape(printable(remark)))
    labels = f", {plural(len(counted.labels), 'label')}" if counted.labels else ""
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
    from data_pipeline.errors import printable

    if not counts:
        return
    table = Table(box=None, show_header=False)
    table.add_column(justify="right", max_width=40, no_wrap=True)
    for name, number in list(counts.items())[:SHOWN]:
        length = round(BAR * number / max(counts.values()))
        table.add_row(
            escape(printable(name)), "█" * length or "·", f"{number:,}", f"[dim]{_share(number, total)}[/dim]"
        )
    console.print(f"[bold]{title}[/bold]")
    console.print(table)
    show_more(console, len(counts))


def _short(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) else f"{number:.3g}"


def _range(spread: Spread, name: Callable[[float], str] = _short) -> str:
    if spread.smallest == spread.largest:
        return name(spread.smallest)
    return f"{name(spread.smallest)} to {name(spread.largest)}"


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else "-"
