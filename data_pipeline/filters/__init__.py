"""Filters: a data set in, a smaller or changed one out, by a list of steps that each say what they removed and why.

    from data_pipeline.filters import parse_steps, run_filters
    report = run_filters(Path("data/train"), Path("data/clean"), parse_steps(["duplicates", "captions:min_words=3"]))

The one idea: a step is a class with one method that looks at one sample (`SampleStep.look`), or at a few bytes computed
of each (`SetStep.decide`), and says what to keep, what to drop for what reason, and what to change. run.py does the
rest: it looks at all samples in parallel, decides, writes what is kept, and counts.

  step.py              what a step is
  look.py run.py       one pass over all samples; deciding, writing
  report.py            what came of it
  parse.py             steps from words or from what YAML holds; the list of all of them, `STEPS`
  duplicates.py        equal pictures or captions, in the set and with a test set
  near_duplicates.py hamming.py        pictures that look the same
  captions.py language.py texts.py     what captions must be like; reading and changing texts of a sample
  personal_data.py patterns.py         e-mail, phone, card and bank numbers, addresses: masked or removed
  image_size.py        pixels and aspect
  scores.py            thresholds, top shares and pseudo-labels by a table that a model has made

To add a step: a frozen dataclass of one of the two kinds in a file of its own, whose fields are its options, a line in
`STEPS`, and a test of the same name.
"""

from data_pipeline.filters.parse import STEPS, parse_steps
from data_pipeline.filters.report import REPORT_FILE, Example, FilterReport, StepReport
from data_pipeline.filters.run import run_filters
from data_pipeline.filters.step import Change, Drop, Removed, SampleStep, SetStep, Signatures, Step

__all__ = [
    "REPORT_FILE",
    "STEPS",
    "Change",
    "Drop",
    "Example",
    "FilterReport",
    "Removed",
    "SampleStep",
    "SetStep",
    "Signatures",
    "Step",
    "StepReport",
    "parse_steps",
    "run_filters",
]
