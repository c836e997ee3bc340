"""Random damages to the files that a run reads, each a function of its seed: `damage(seed, folder)`.

`folder` is a copy of what `make_base` wrote: tars and their index, the same samples as Parquet, a recipe, and a run
with a checkpoint. One file of it is damaged: its bytes, or what they mean (a value in JSON or YAML, one member of a
tar, one cell of Parquet).
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tars import picture, tar_of

from pretrain.cli import main

SAMPLES, SHARDS = 24, 2
KINDS = ("jpg", "png", "webp")
SIZES = [
    "model.vision.layers=1", "model.vision.width=32", "model.vision.heads=2", "model.vision.image_size=16",
    "model.vision.patch=8", "model.text.layers=1", "model.text.width=32", "model.text.heads=2",
    "model.text.context=16", "model.text.vocab_size=384", "model.embed_dim=32", "train.global_batch=8",
    "train.warmup=1", "train.log_every=1", "eval.every=0", "eval.samples=8", "data.test=null", "data.workers=0",
    "checkpoint.every=100", "run.device=cpu",
]  # fmt: skip
HALFWAY = ("train.steps=6", "train.stop_at=3")  # where the run of the base is stopped, to be resumed
TARGETS = {  # what is damaged -> how often
    "tar": 4, "tar with index": 3, "member": 4, "index": 2, "table": 1,
    "parquet": 2, "cell": 2, "recipe": 3, "checkpoint": 3, "run": 3,
}  # fmt: skip
VALUES: tuple[Any, ...] = (
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**70),
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    None,
    True,
    "",
    "x",
)
VALUES += ("\ud800", "a\0b", "../x", [], {}, [[[]]], {"a": 1})


def make_base(folder: Path) -> None:
    """Everything that is damaged later, whole."""
    names = [f"s{number:02d}" for number in range(SAMPLES)]
    samples = {key: fields(number) for number, key in enumerate(names)}
    for shard in range(SHARDS):
        write_tar(folder / "tars" / f"{shard}.tar", {key: samples[key] for key in names[shard::SHARDS]})
    write_parquet(folder / "rows" / "rows.parquet", samples)
    assert main(["data", "stats", str(folder / "tars")]) == 0
    run = [f"data.train={folder / 'tars'}", f"run.dir={folder / 'run'}", *SIZES, *HALFWAY]
    assert main(["train", "quickstart", *run]) == 0
    recipe = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def fields(number: int) -> dict[str, bytes]:
    """One sample."""
    kind = KINDS[number % 3]
    made = {kind: picture(number, (24, 20), {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind])}
    if number % 4 == 3:
        return made | {"json": json.dumps({"captions": [f"caption {number}", "another"], "label": "thing"}).encode()}
    return made | {"txt": f"caption {number}".encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A shard of whole samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of([(f"{key}.{name}", data) for key, each in samples.items() for name, data in each.items()]))


def write_parquet(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """The same samples as rows."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [next(each[kind] for kind in KINDS if kind in each) for each in samples.values()]
    captions = [f"caption {number}" for number in range(len(samples))]
    table = pyarrow.table({"image": pyarrow.array(images, pyarrow.binary()), "caption": captions})
    parquet.write_table(table, path, row_group_size=8, write_page_checksum=True)


def damage(seed: int, folder: Path) -> tuple[str, str]:
    """(what was damaged, how): one file of a fresh copy."""
    draw = np.random.default_rng(seed)
    target = str(draw.choice(list(TARGETS), p=np.array(list(TARGETS.values())) / sum(TARGETS.values())))
    shard = folder / "tars" / f"{int(draw.integers(SHARDS))}.tar"
    if target in ("tar", "member"):
        for each in [*(folder / "tars").glob("*.npz"), *(folder / "tars").glob("index.json")]:
            each.unlink()
    if target in ("tar", "tar with index"):
        return target, of_bytes(shard, draw)
    if target == "member":
        return target, of_member(shard, draw)
    if target == "table":
        return target, of_bytes(pick(sorted((folder / "tars").glob("*.npz")), draw), draw)
    if target == "index":
        return target, of_tree(folder / "tars" / "index.json", draw)
    if target == "recipe":
        return target, of_tree(folder / "recipe.yaml", draw)
    if target == "parquet":
        return target, of_bytes(folder / "rows" / "rows.parquet", draw)
    if target == "cell":
        return target, of_cell(folder / "rows" / "rows.parquet", draw)
    run = folder / "run"
    files = [each for each in sorted(run.rglob("*")) if each.is_file() and not each.is_symlink()]
    inside = [each for each in files if "checkpoints" in each.parts]
    path = pick([each for each in files if (each in inside) == (target == "checkpoint")], draw)
    return target, of_tree(path, draw) if path.suffix in (".json", ".yaml") else of_bytes(path, draw)


def pick(paths: list[Path], draw: np.random.Generator) -> Path:
    """One of them."""
    return paths[int(draw.integers(len(paths)))]


# --- how


def of_bytes(path: Path, draw: np.random.Generator) -> str:
    """Damage the bytes of a file; says how."""
    how, data = changed(path.read_bytes(), draw)
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{path.name}: {how}"


def changed(data: bytes, draw: np.random.Generator) -> tuple[str, bytes | None]:
    """(how, the bytes with one random damage); None: the file is gone."""
    size = len(data)
    at = int(draw.integers(size + 1))
    length = int(min(size - at, 2 ** draw.integers(0, 14)))
    noise = draw.integers(0, 256, max(1, length), np.uint8).tobytes()
    block, count = at // 512 * 512, max(512, length // 512 * 512)
    ways: dict[str, Callable[[], bytes | None]] = {
        "flipped": lambda: flipped(data, draw),
        "noise": lambda: data[:at] + noise + data[at + len(noise) :],
        "zeros": lambda: data[:at] + bytes(length) + data[at + length :],
        "zeroed tail": lambda: data[:at] + bytes(size - at),
        "cut": lambda: data[:at],
        "head gone": lambda: data[at:],
        "inserted": lambda: data[:at] + noise + data[at:],
        "taken out": lambda: data[:at] + data[at + length :],
        "doubled": lambda: data[: at + length] + data[at:],
        "blocks taken out": lambda: data[:block] + data[block + count :],
        "blocks doubled": lambda: data[: block + count] + data[block:],
        "appended": lambda: data + noise,
        "joined": lambda: data + data,
        "empty": lambda: b"",
        "gone": lambda: None,
    }
    how = str(draw.choice(list(ways)))
    return f"{how} at {at}, {length} bytes", ways[how]()


def flipped(data: bytes, draw: np.random.Generator) -> bytes:
    """Some bits the other way."""
    if not data:
        return data
    new = bytearray(data)
    for place in draw.integers(0, len(data), int(draw.integers(1, 9))):
        new[place] ^= 1 << int(draw.integers(8))
    return bytes(new)


def of_member(path: Path, draw: np.random.Generator) -> str:
    """Damage one member of a tar that stays sound."""
    with tarfile.open(path) as tar:
        files = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]  # all are files
    number = int(draw.integers(len(files)))
    name, data = files[number]
    how, new = changed(data, draw)
    if new is None:
        del files[number]
    else:
        files[number] = (name, new)
    path.write_bytes(tar_of(files))
    return f"{name} in {path.name}: {how}"


def of_cell(path: Path, draw: np.random.Generator) -> str:
    """Damage one cell of Parquet that stays sound."""
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(path)
    column = str(draw.choice(table.column_names))
    cells = table.column(column).to_pylist()
    row = int(draw.integers(len(cells)))
    if column == "image":
        how, cells[row] = changed(cells[row], draw)
    else:
        texts = [None, "", " ", "\0", "x" * 100_000]
        cells[row] = texts[int(draw.integers(len(texts)))]
        how = f"{str(cells[row])[:9]!r}"
    values = pyarrow.array(cells, table.schema.field(column).type)
    table = table.set_column(table.column_names.index(column), column, values)
    parquet.write_table(table, path, row_group_size=8, write_page_checksum=True)
    return f"{column} of row {row}: {how}"


def of_tree(path: Path, draw: np.random.Generator) -> str:
    """Change one value of a JSON or YAML file, or its bytes."""
    if draw.random() < 0.3:
        return of_bytes(path, draw)
    is_json = path.suffix == ".json"
    tree = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    node, where = tree, []
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        parent, key = node, keys[int(draw.integers(len(keys)))]
        where.append(str(key))
        node = parent[key]
        if draw.random() < 0.1:
            break
    value = VALUES[int(draw.integers(len(VALUES)))]
    if draw.random() < 0.2:
        del parent[key]
        value = "(taken out)"
    else:
        parent[key] = value
    text = json.dumps(tree) if is_json else io.StringIO()
    if not is_json:
        yaml.safe_dump(tree, text, sort_keys=False)
        text = text.getvalue()
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return f"{path.name}: {'.'.join(where)} = {str(value)[:40]!r}"
