"""What the `weft data` commands share: the options they all have, progress, and how a result is printed.

With --json, exactly one JSON object on stdout; progress goes to stderr, and only to a terminal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from data_pipeline.shards import Written

SHOWN = 12  # problems, skipped sources or bars on a screen; --json has all


def place_given(text: str) -> str:
    """A path or a URL as it was given; BadParameter when it is empty: that would mean the current folder."""
    if not text.strip():
        raise typer.BadParameter("it is empty, as a shell variable is that was never set; give . for this folder")
    return text


def path_given(text: str) -> Path:
    """The same, as a path."""
    return Path(place_given(text))


Out = Annotated[Path, typer.Argument(parser=path_given, help="New folder; gets the sub-folders train and test.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Processes = Annotated[int | None, typer.Option(min=0, help="Processes at work; default: one a core.")]
ShardKeys = Annotated[
    bool, typer.Option("--shard-keys", help="Call samples <shard>/<key>, for shards that have equal keys.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn by chance.")]
Sound = Annotated[bool, typer.Option("--sound/--no-sound", help="With the sound, or pictures and captions only.")]


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


def show_written(out: Path, parts: dict[str, Written], as_json: bool, more: dict[str, Any] | None = None) -> None:
    """What was written to the sub-folders of `out`; `more`: what else to say in JSON."""
    from data_pipeline.errors import printable
    from data_pipeline.page import readable_size

    if as_json:
        tree = {name: written_tree(out / name, written) for name, written in parts.items()}
        print_json({"path": str(out), "train": None, "test": None, **tree, **(more or {})})
        return
    console = Console(soft_wrap=True)
    for name, written in parts.items():
        index = written.index
        size = readable_size(sum(shard.bytes for shard in index.shards))
        console.print(
            escape(f"{out / name}: {plural(index.samples, 'sample')} in {plural(len(index.shards), 'shard')}, {size}")
        )
        if written.skipped:
            console.print(f"[yellow]skipped {len(written.skipped)}:[/yellow]")
        if len(written.skipped) > SHOWN:
            for reason, number in _reasons(written).items():
                console.print(escape(printable(f"  {number} x {reason}")), highlight=False)
        for skip in written.skipped[:SHOWN]:
            console.print(escape(printable(f"  {skip.source}: {skip.reason}")))
        show_more(console, len(written.skipped))


def written_tree(folder: Path, written: Written) -> dict[str, Any]:
    """What was written to one folder, in JSON's types."""
    index = written.index
    return {
        "path": str(folder),
        "samples": index.samples,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "fingerprint": index.fingerprint,
        "reasons": _reasons(written),
        "skipped": [asdict(skip) for skip in written.skipped],
    }


def _reasons(written: Written) -> dict[str, int]:
    """Why things were skipped: reason -> how many, the most frequent first."""
    return dict(Counter(skip.reason for skip in written.skipped).most_common())


def show_more(console: Console, total: int) -> None:
    """That there is more than the SHOWN, if so."""
    if total > SHOWN:
        console.print(f"  ... and {total - SHOWN} more: --json lists all", highlight=False)


def plural(number: int, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
