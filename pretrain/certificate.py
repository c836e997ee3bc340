"""The order certificate: a running digest of which sample was read at which position, from the first step on.

    certificate = sum over all rows (position, sample) read so far of
                      mix(mix(position + data) + sample)              modulo 2^64, printed as 16 hex digits

where `mix` is the finaliser of SplitMix64 (data_pipeline/order.py), `sample` is the id of the sample that is really in
the row (the replacement, where one could not be used) and `data` the first 64 bits of the data's fingerprint.

Because it is a sum over positions it does not depend on ranks, workers, microbatches, loaders or where a run was
stopped and resumed, nor on how positions are cut into global batches. Every rank adds the rows it has read, and the
sums travel with the numbers that ranks agree on at each step anyway: it costs no message of its own. It goes into
metrics.jsonl (`order`) and into checkpoints, and `weft report --compare A B` compares two runs by it.

It is a check against accidents (64 bits), not against forgers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import Batch
from data_pipeline.order import mix
from data_pipeline.strict_json import read_json
from pretrain.errors import RequestError
from pretrain.metrics import METRICS, read_lines

HALF = 32
LOW = (1 << HALF) - 1


class Certificate:
    """The digest of a run so far. `known` is what the checkpoint it goes on from holds; None: it holds none."""

    def __init__(self, data_fingerprint: str, known: str | None = "") -> None:
        self._data = np.uint64(int(data_fingerprint[:16] or "0", 16))
        self._sum: int | None = None if known is None else int(known or "0", 16)

    def terms(self, batch: Batch) -> list[int]:
        """This rank's rows as two numbers that may be summed over ranks: the upper and the lower 32 bits."""
        position = batch.position.cpu().numpy().astype(np.uint64)
        sample = batch.sample.cpu().numpy().astype(np.uint64)
        total = int(np.add.reduce(mix(mix(position + self._data) + sample), dtype=np.uint64))
        return [total >> HALF, total & LOW]

    def add(self, upper: int, lower: int) -> None:
        """Take in the sums over all ranks of what `terms` gave."""
        if self._sum is not None:
            self._sum = (self._sum + (upper << HALF) + lower) % (1 << 64)

    def __str__(self) -> str:
        return "" if self._sum is None else f"{self._sum:016x}"


@dataclass(frozen=True)
class Comparison:
    """What two runs read, as far as both have written it down."""

    same: bool
    samples: int  # both read the same up to here
    differs_at: int | None  # and no longer here; None: they never differ
    sentence: str


def compare_orders(first: Path, second: Path) -> Comparison:
    """Whether two runs read the same samples in the same order, at every count of samples that both logged.

    Raises RequestError for a folder without metrics.
    """
    one, other = _logged(first), _logged(second)
    common = sorted(one.keys() & other.keys())
    if not common:
        lacking = f"{second if one else first} has no order certificate"
        why = "they logged no common number of samples" if one and other else lacking
        return Comparison(False, 0, None, f"{first} and {second} cannot be compared: {why}")
    differing = next((samples for samples in common if one[samples] != other[samples]), None)
    if differing is None:
        return Comparison(True, common[-1], None, f"{first} and {second} read the same {common[-1]} samples in order")
    same = max((samples for samples in common if samples < differing), default=0)
    reason = _reason(first, second)
    sentence = f"{first} and {second} read the same first {same} samples, and differ within the first {differing}"
    return Comparison(False, same, differing, sentence + reason)


def _logged(run: Path) -> dict[int, str]:
    """Certificates by the number of samples read."""
    if not (run / METRICS).is_file():
        raise RequestError(f"{run} is not a run folder: it has no {METRICS}")
    return {line["samples"]: line["order"] for line in read_lines(run / METRICS) if line.get("order")}


def _reason(first: Path, second: Path) -> str:
    found = []
    for run in (first, second):
        try:
            manifest = read_json((run / "manifest.json").read_text(encoding="utf-8"))
            found.append((manifest["data_fingerprint"], manifest["seed"]))
        except (OSError, ValueError, KeyError, TypeError):
            return ""
    if found[0][0] != found[1][0]:
        return f": their data differ (fingerprints {found[0][0][:12]} and {found[1][0][:12]})"
    return f": their seeds differ ({found[0][1]} and {found[1][1]})" if found[0][1] != found[1][1] else ""
