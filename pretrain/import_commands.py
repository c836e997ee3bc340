"""`weft data import`: other people's data sets, each by one function of `data_pipeline.importers`.

The data sets with a published format share one command form, `PUBLISHED`; a new importer of that kind is a line there.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.data_output import Json, Out, Processes, Seed, Sound, path_given, progress_bar, show_written

if TYPE_CHECKING:
    from data_pipeline.importers.split import Imported

importers = typer.Typer(
    help="Convert common data set formats into shards: OUT/train and OUT/test.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

TestShare = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Share of the samples that goes to OUT/test; 0: no test set.")
]
NewShare = Annotated[
    float | None,
    typer.Option(
        "--test-share",
        min=0.0,
        max=1.0,
        help="Draw another split: the share of OUT/test. Default: the published one, or 0.1 where there is none.",
    ),
]
Licence = Annotated[str | None, typer.Option(help="Licence of the samples for which the data set tells none.")]
Media = Annotated[
    Path | None,
    typer.Option(parser=path_given, help="Folder of the images or sounds; default: where the data set has them."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="local|HOST:PORT",
        help="Work as tasks of this Ray cluster, or of a Ray on this machine. What is read and OUT must lie on a file "
        "system that all its nodes share; --processes is then the most tasks at a time.",
    ),
]

PUBLISHED = {
    "coco": "Import COCO captions: annotations/captions_*.json, train2017/, val2017/; val becomes OUT/test.",
    "flickr30k": "Import Flickr30K: the .token file, results.csv or Karpathy's dataset_flickr30k.json, and its images.",
    "vqav2": "Import VQAv2: questions and annotations for COCO's images, ten answers each; val becomes OUT/test.",
    "gqa": "Import GQA: *_balanced_questions.json and images/; testdev becomes OUT/test.",
    "vcr": "Import VCR: train.jsonl, val.jsonl and vcr1images/, answers and reasons to choose; val becomes OUT/test.",
    "img2dataset": "Import what img2dataset downloaded as files or as Parquet; its tars need no import.",
    "librispeech": "Import speech in SPEAKER/CHAPTER/ with a *.trans.txt: LibriSpeech and what looks like it.",
    "manifest": "Import speech by manifests: JSON lines as NeMo has them, or the .tsv of Common Voice.",
    "audiocaps": "Import AudioCaps: train.csv, val.csv, test.csv and the sounds.",
    "clotho": "Import Clotho: clotho_captions_*.csv and the folders development, validation and evaluation.",
}


@importers.command("folder")
def import_folder_command(
    path: Annotated[Path, typer.Argument(parser=path_given, help="Folder of images.")],
    out: Out,
    licence: Licence = None,
    test_share: NewShare = None,
    seed: Seed = 0,
    processes: Processes = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Import a folder of images with captions: .txt, .caption or .json beside each, a table, or one folder a class."""
    from data_pipeline.importers.folder import import_folder

    with progress_bar("importing") as progress:
        imported = import_folder(
            path,
            out,
            licence=licence,
            test_share=test_share,
            seed=seed,
            processes=processes,
            on=ray,
            progress=progress,
        )
    show_imported(out, imported, as_json)


@importers.command("table")
def import_table_command(
    file: Annotated[Path, typer.Argument(parser=path_given, help="The table.")],
    out: Out,
    image_column: Annotated[str | None, typer.Option(help="Column of the images; default: found by name.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of the captions; default: found by name.")] = None,
    quotes: Annotated[
        bool, typer.Option("--quotes/--no-quotes", help="Whether quotes in a CSV or TSV are marks or letters.")
    ] = True,
    licence: Licence = None,
    test_share: TestShare = 0.1,
    seed: Seed = 0,
    processes: Processes = None,
    ray: Ray = None,
    as_json: Json = False,
) -> None:
    """Import a table (CSV, TSV or Parquet) with a column of images and one of captions."""
    from data_pipeline.importers.table import import_table

    with progress_bar("importing") as progress:
        imported = import_table(
            file,
            out,
            image_column=image_column,
            caption_column=caption_column,
            quotes=quotes,
            licence=licence,
            test_share=test_share,
            seed=seed,
            processes=processes,
            on=ray,
            progress=progress,
        )
    show_imported(out, imported, as_json)


@importers.command("tuxpaint")
def import_tuxpaint_command(
    out: Out,
    language: Annotated[str, typer.Option(help="Language of captions and speech: en, de, ja, ...")] = "en",
    test_share: TestShare = 0.2,
    seed: Seed = 0,
    package: Annotated[
        Path | None,
        typer.Option(parser=path_given, help="The .deb of tuxpaint-stamps-default; default: downloaded."),
    ] = None,
    sound: Sound = True,
    processes: Processes = None,
    ray: Ray = None,
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
            on=ray,
            progress=progress,
        )
    show_imported(out, imported, as_json)


def show_imported(out: Path, imported: Imported, as_json: bool) -> None:
    """What an import wrote, and whether it was there already."""
    show_written(out, imported.parts, as_json, {"already": imported.already, "notes": list(imported.notes)})
    for note in () if as_json else imported.notes:
        print(note)
    if imported.already and not as_json:
        print(f"{out} was there already, from the same source: nothing was changed")


def _add_published(name: str, meaning: str) -> None:
    """Make the command of one published data set: all of them take the same options."""

    def command(
        source: Annotated[
            Path, typer.Argument(parser=path_given, help="Folder of the data set, or its annotation file.")
        ],
        out: Out,
        media: Media = None,
        licence: Licence = None,
        test_share: NewShare = None,
        seed: Seed = 0,
        processes: Processes = None,
        ray: Ray = None,
        as_json: Json = False,
    ) -> None:
        import_it = getattr(import_module(f"data_pipeline.importers.{name}"), f"import_{name}")
        with progress_bar("importing") as progress:
            imported = import_it(
                source,
                out,
                media=media,
                licence=licence,
                test_share=test_share,
                seed=seed,
                processes=processes,
                on=ray,
                progress=progress,
            )
        show_imported(out, imported, as_json)

    importers.command(name, help=meaning)(command)


for _name, _meaning in PUBLISHED.items():
    _add_published(_name, _meaning)
