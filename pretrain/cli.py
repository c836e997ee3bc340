"""The `weft` command: parse, call one function of the house, print its result.

Exit codes: 0 it holds, 1 the thing asked about is bad, 2 the request is wrong. A user's mistake gets one sentence on
stderr and never a traceback. Heavy libraries are imported inside the commands, so that `weft --help` is quick.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pretrain.data_commands import data
from pretrain.data_output import path_given, place_given
from pretrain.errors import MemoryFullError, RequestError, WeftError, is_memory_full

weft = typer.Typer(
    name="weft",
    help="Train multimodal transformers from sharded data, on a laptop or a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
checkpoints = typer.Typer(help="Inspect and verify checkpoints.", no_args_is_help=True, pretty_exceptions_enable=False)
bench = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True, pretty_exceptions_enable=False)
weft.add_typer(data, name="data")
weft.add_typer(checkpoints, name="checkpoint")
weft.add_typer(bench, name="bench")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides of the recipe: train.lr=1e-3, 'train={lr: 1e-3, warmup: 50}'."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]

# What the system says of a file that will not be otherwise at the next attempt
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

# What gloo and NCCL say when a rank at the other end of a connection is gone
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "remote process exited")

# What a command line that does not parse raises. Its home has moved from click into typer; this is it in both.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


@weft.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Number of ranks to start on this machine.")] = 1,
    restarts: Annotated[
        int, typer.Option(min=0, help="Restart from the newest checkpoint at most N times when a rank dies or hangs.")
    ] = 0,
    min_nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Fewest ranks to restart with after an attempt without progress."),
    ] = None,
) -> None:
    """Train a recipe; resumes from the newest checkpoint of its run folder."""
    from pretrain.config import load_recipe, repeated
    from pretrain.job import refuse_ranks_of_ranks, this_job, unused_tasks

    resolved = load_recipe(recipe, overrides or [])
    job = this_job()
    refuse_ranks_of_ranks(job, nproc)
    if hint := unused_tasks(job, nproc):
        print(hint, file=sys.stderr)
    job.announce()
    if job.rank == 0 and job.by != "weft":
        _say_repeated(repeated(overrides or []))
    from pretrain.launch import end_with_launcher, launch
    from pretrain.parallel.choose import with_layout
    from pretrain.preflight import check
    from pretrain.restart import Restarts
    from pretrain.run_lock import refuse_if_held

    least = nproc if min_nproc is None else min_nproc
    if least > nproc:
        raise RequestError(f"--min-nproc is {least}, more than --nproc {nproc}: give at most {nproc}")
    if least < nproc and not restarts:
        raise RequestError(f"--min-nproc {least} is for restarts, but there are none: give --restarts too")
    if restarts and resolved.train.resume == "never":
        raise RequestError("--restarts resumes from checkpoints, but train.resume is never: use train.resume=auto")
    ranks = ["--nproc", str(nproc)] if nproc > 1 else []
    ranks += ["--restarts", str(restarts)] if restarts else []
    ranks += ["--min-nproc", str(least)] if least < nproc else []
    arguments = ["train", recipe, *(overrides or []), *ranks]
    if ranks and not job.by:
        refuse_if_held(resolved.run.dir)
        check(with_layout(resolved, nproc), nproc)  # one sentence here instead of one from each rank
        again = [Restarts(resolved, nproc, restarts, least)] if restarts else []
        raise typer.Exit(launch(arguments, nproc, *again))
    end_with_launcher()
    from pretrain.train import train as run

    raise typer.Exit(run(resolved, shlex.join(["weft", *arguments])))


@weft.command()
def config(
    recipe: RecipeName,
    overrides: Overrides = None,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print YAML instead; saved to a file, it is a recipe.")] = False,
    json_: Json = False,
) -> None:
    """Print the resolved recipe: each key with its value, default, type and meaning.

    With --yaml or --json the output is itself a recipe: `weft config quickstart --yaml > mine.yaml`.
    """
    from pretrain.config import item_section, keys_of, load_recipe, repeated

    resolved = load_recipe(recipe, overrides or [])
    _say_repeated(repeated(overrides or []))
    tree = resolved.model_dump(mode="json")
    if yaml or json_:
        print(json.dumps(tree) if json_ else resolved.yaml(), end="\n" if json_ else "")
        return
    table = Table("key", "value", "default", "type", "meaning", box=None, header_style="bold", pad_edge=False)
    for key, field in keys_of(type(resolved)):
        value: Any = tree
        for part in key.split("."):
            value = value[part]
        if isinstance(value, dict):
            continue
        _add_row(table, key, _short(value), field)
        if item := item_section(field):  # the keys of each item of a list
            for name, inner in keys_of(item):
                given = [each[name] for each in value]
                _add_row(table, f"{key}[].{name}", ", ".join(map(_short, given)), inner)
    Console(width=max(160, Console().width)).print(table)


def _add_row(table: Table, key: str, value: str, field: Any) -> None:
    default = "required" if field.is_required() else _short(field.get_default(call_default_factory=True))
    kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
    if not isinstance(field.annotation, type):
        kind = str(field.annotation).replace("pretrain.sections.", "")
    kind = re.sub(r"Annotated\[([^,]+), .*\]\]", r"\1]", kind.replace("typing.", "").replace("pathlib.", ""))
    table.add_row(*(escape(text) for text in (key, value, default, kind, field.description or "")))


def _say_repeated(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(sentence, file=sys.stderr)


@weft.command("eval")
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", parser=path_given, help="A run folder, or a checkpoint.")
    ],
    data_path: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", parser=place_given, help="Shards; default: the recipe's data.test."),
    ] = None,
    task: Annotated[str, typer.Option(help="retrieval, zero_shot or captioning; all: what the model has.")] = "all",
    samples: Annotated[
        int | None,
        typer.Option(
            min=2, help="At most N samples, spread over the set; default: the recipe's eval.samples.", metavar="N"
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Score a checkpoint: retrieval both ways and zero-shot classification, or the loss of a captioner.

    Retrieval is scored as published for COCO and Flickr30K: every caption of every image is a candidate. Exit code 1:
    the model's embeddings or loss are not finite.
    """
    from data_pipeline.strict_json import strict_json
    from pretrain.evaluation.evaluate import TASKS, summary
    from pretrain.evaluation.standalone import evaluate_checkpoint

    known = ["all", *(name for names in TASKS.values() for name in names)]
    if task not in known:
        raise RequestError(f"--task is {task!r}: use one of {', '.join(known)}")
    result, found = evaluate_checkpoint(path, data_path, task, samples)
    print(strict_json(result) if json_ else "\n".join([summary(found), *found.notes]))
    if found.problem:
        raise WeftError(f"{path}: {found.problem}")


@weft.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=path_given, help="A run folder.")],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="[OTHER]", parser=path_given, help="With --compare: the run to compare it with."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", parser=path_given, help="Where to write; default: RUN/report.html.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Say whether RUN and OTHER read the same data in order; exit 1 if not.")
    ] = False,
    json_: Json = False,
) -> None:
    """Write one self-contained HTML page about a run, or compare what two runs read."""
    if compare != (other is not None):
        raise RequestError("--compare takes two run folders: weft report --compare RUN OTHER")
    if other is not None:
        from pretrain.certificate import compare_orders

        found = compare_orders(run, other)
        print(json.dumps(asdict(found)) if json_ else found.sentence)
        raise typer.Exit(0 if found.same else 1)
    from pretrain.report import write_report

    written = write_report(run, out or run / "report.html")
    print(json.dumps({"report": str(written)}) if json_ else f"report: {written}")


@checkpoints.command()
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", parser=path_given, help="A checkpoint, or a run folder.")],
    json_: Json = False,
) -> None:
    """Show what a checkpoint contains."""
    from pretrain.checkpoint.format import describe

    found = describe(path)
    if json_:
        print(
            json.dumps(
                {
                    "path": str(found.path),
                    "step": found.step,
                    "samples": found.samples,
                    "parameters": found.parameters,
                    "parameter_count": found.parameter_count,
                    "data_fingerprint": found.data_fingerprint,
                    "files": found.files,
                    "recipe": found.recipe,
                }
            )
        )
        return
    print(f"{found.path}: step {found.step}, {found.samples} samples, {found.parameter_count / 1e6:.2f} M parameters")
    for name, shape in found.parameters.items():
        print(f"  {name}  {'x'.join(map(str, shape))}")


@checkpoints.command("verify")
def verify_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="PATH", parser=path_given, help="A checkpoint, or a run folder.")],
    json_: Json = False,
) -> None:
    """Read every byte and compare checksums; exit 1 if one is wrong."""
    from pretrain.checkpoint.format import describe, verify

    found = describe(path)
    problems = verify(found)
    if json_:
        print(json.dumps({"path": str(found.path), "ok": not problems, "problems": problems}))
    else:
        print("\n".join(problems) or f"{found.path} is whole: {len(found.files)} files")
    raise typer.Exit(1 if problems else 0)


@bench.command("data")
def bench_data(
    ray: Annotated[
        bool, typer.Option("--ray", help="Compare the loader on Ray with the one in process instead.")
    ] = False,
    width: Annotated[int, typer.Option(min=1, help="Width of the made-up photographs, in pixels.")] = 512,
    height: Annotated[int, typer.Option(min=1, help="Their height.")] = 384,
    json_: Json = False,
) -> None:
    """Compare the loader with webdataset and other installed loaders on the same shards."""
    if ray:
        if (width, height) != (512, 384):
            raise RequestError("--ray measures photographs of 512 x 384: leave --width and --height away")
        from data_pipeline.bench.on_ray import bench_ray

        measured = bench_ray()
        print(json.dumps(measured.as_dict()) if json_ else str(measured))
        return
    from data_pipeline.bench.loader import bench_loader

    result = bench_loader(width=width, height=height)
    print(json.dumps(result.as_dict()) if json_ else str(result))


@bench.command("step")
def bench_step(
    overrides: Overrides = None,
    recipe: Annotated[
        str, typer.Option(help="Recipe whose model, batch, precision and layout are measured.")
    ] = "quickstart",
    nproc: Annotated[int, typer.Option(min=1, help="Number of ranks to start on this machine.")] = 1,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Print a table: one process, and --nproc ranks under every layout.")
    ] = False,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Also peers with compiled blocks. Default: on a GPU; on a CPU it takes minutes.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Compare the training step with the same model in plain torch, and with open_clip's where it is installed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells stderr that it starts and stops
    from pretrain.config import load_recipe
    from pretrain.launch import launch

    resolved = load_recipe(recipe, overrides or [])
    if layouts:
        from pretrain.bench_layouts import bench_layouts, markdown

        show = partial(print, file=sys.stderr, flush=True)
        rows = bench_layouts(resolved, recipe, overrides or [], nproc, show)
        print(json.dumps(rows) if json_ else markdown(rows))
        return
    if nproc > 1 and not _one_of_several(nproc):
        flags = ["--recipe", recipe, "--nproc", str(nproc), *(["--json"] if json_ else [])]
        flags += [] if compile_ is None else ["--compile" if compile_ else "--no-compile"]
        raise typer.Exit(launch(["bench", "step", *(overrides or []), *flags], nproc))
    from pretrain.bench import bench_training_step

    result = bench_training_step(resolved, compile_)
    if result is not None:
        print(json.dumps(result.as_dict()) if json_ else str(result))


@bench.command("checkpoint")
def bench_checkpoint(
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="Recipe whose model, layout and run.dir are used.")] = "quickstart",
    nproc: Annotated[int, typer.Option(min=1, help="Number of ranks to start on this machine.")] = 1,
    json_: Json = False,
) -> None:
    """Measure how long saving a checkpoint blocks training, asynchronous and not."""
    from pretrain.config import load_recipe
    from pretrain.launch import launch

    resolved = load_recipe(recipe, overrides or [])
    if nproc > 1 and not _one_of_several(nproc):
        flags = ["--recipe", recipe, "--nproc", str(nproc), *(["--json"] if json_ else [])]
        raise typer.Exit(launch(["bench", "checkpoint", *(overrides or []), *flags], nproc))
    from pretrain.bench_checkpoint import bench_checkpoint as measure

    result = measure(resolved)
    if result is not None:
        print(json.dumps(result.as_dict()) if json_ else str(result))


@bench.command("kernels")
def bench_kernels(
    out: Annotated[Path, typer.Option(metavar="DIR", parser=path_given, help="Folder for the results.")] = Path(
        "runs/bench-kernels"
    ),
    only: Annotated[str, typer.Option(metavar="NAME,...", help="Operations to measure; default: all.")] = "",
    quick: Annotated[bool, typer.Option(help="Main rows and few repetitions only.")] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="Start no new measurement after about N minutes.")] = 8.0,
    json_: Json = False,
) -> None:
    """Check every kernel against fp64, then measure time and memory against peers; exit 1 if one is wrong."""
    from kernels.bench import suite
    from kernels.bench.table import markdown

    show = partial(print, file=sys.stderr, flush=True) if json_ else partial(print, flush=True)
    written = suite.run(out, [name for name in only.split(",") if name], quick, minutes, show=show)
    results = json.loads(written.read_text())
    print(json.dumps(results) if json_ else f"\n{markdown(results)}\n{suite.picture(written)}")
    raise typer.Exit(0 if suite.holds(results) else 1)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. A user's mistake is one sentence on stderr."""
    # what libraries tell each other of deprecated names is not the user's to mend
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a path need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        line = _expanded(sys.argv[1:] if arguments is None else arguments)
        return int(_command_tree()(line, prog_name="weft", standalone_mode=False) or 0)
    except USAGE_ERROR as error:
        sentence = _usage_sentence(error)
        return _fail(sentence, 2) if sentence else 2  # a bare `weft` has been answered with its help
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except MemoryFullError as error:
        return _fail(str(error), error.exit_code, error.lasting)
    except WeftError as error:
        return _fail(str(error), error.exit_code)
    except FileNotFoundError as error:
        return _fail(_sentence(error), 2)
    except OSError as error:
        if is_memory_full(error):
            return _fail(_memory_full(error), 1)
        sentence = _sentence(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not sentence.startswith("the disk is full"):
            sentence = f"the disk is full ({sentence}): make room and give the same command again"
        return _fail(sentence, 1, lasting=error.errno in LASTING)
    except ValueError as error:
        from data_pipeline.errors import DataError

        bad_data = isinstance(error, DataError)
        return _fail(str(error), 1 if bad_data else 2, lasting=bad_data)  # a library's own may be one peer's end
    except (MemoryError, RuntimeError) as error:
        if is_memory_full(error):
            return _fail(_memory_full(error), 1)
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        return _fail("the connection to another rank was lost: see what that rank says, and why it ended", 1, False)


@cache
def _command_tree() -> Callable[..., Any]:
    """The commands as click's objects, made once a process, because it takes typer a tenth of a second."""
    return typer.main.get_command(weft)


def _expanded(arguments: list[str]) -> list[str]:
    """With the home folder for `~` in paths and `--option=~/path`, which not every shell expands."""
    expanded = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        path = os.path.expanduser(value) if equals and option.startswith("--") else ""
        expanded.append(f"{option}={path}" if path else os.path.expanduser(argument))
    return expanded


def _one_of_several(nproc: int) -> bool:
    """Whether this process is a rank that a launcher has started; RequestError where that contradicts `--nproc`."""
    from pretrain.job import refuse_ranks_of_ranks, this_job

    job = this_job()
    refuse_ranks_of_ranks(job, nproc)
    job.announce()
    return bool(job.by)


def _fail(sentence: str, code: int, lasting: bool = True) -> int:
    """Say the sentence, and return the code. The launcher starts the job again unless the trouble is `lasting`.

    Where our launcher waits for the ranks, it says what another than the first ended with; else each says its own.
    """
    from pretrain.job import Job, this_job
    from pretrain.launch import leave_word

    if not sentence.isprintable():  # names from data may hold what moves a terminal's cursor
        from data_pipeline.errors import printable

        sentence = "\n".join(map(printable, sentence.split("\n")))
    try:
        job = this_job()
    except RequestError:  # which is not what this command has failed of, or is told already
        job = Job()
    if job.rank == 0:
        print(f"weft: {sentence}", file=sys.stderr, flush=True)
    elif job.by != "weft":
        print(f"weft: rank {job.rank}: {sentence}", file=sys.stderr, flush=True)
    if code != 130:
        leave_word(sentence, lasting)
    return code


def _usage_sentence(error: Any) -> str:
    """What is wrong with the command line, and which help says what would be right."""
    told = " ".join(error.format_message().split()).rstrip(".")
    return f"{told}: see {error.ctx.command_path} --help" if told and error.ctx else told


def _sentence(error: OSError) -> str:
    """Our own sentence where there is one, else what the system says of which file."""
    if error.filename is not None:
        return f"{error.filename}: {(error.strerror or str(error)).lower()}"
    return str(error.args[-1]) if error.args else str(error)


def _memory_full(error: Exception) -> str:
    told = (_sentence(error) if isinstance(error, OSError) else str(error)).partition("\n")[0]
    return (
        f"the memory is full{f' ({told})' if told else ''}: use a smaller batch or model, or a machine with more memory"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, default=lambda each: getattr(each, "model_dump", lambda **_: str(each))(mode="json"))
    return text.strip('"')


if __name__ == "__main__":
    sys.exit(main())
