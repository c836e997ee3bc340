"""Bring other people's data in: a folder of images, a table, a Debian package -> OUT/train and OUT/test.

Each importer is one module with one function, `import_<name>(source, out, ...) -> Imported`:
  folder.py    images with a .txt beside each, or one folder a class
  table.py     CSV, TSV or Parquet with a column of images and one of captions
  tuxpaint.py  real pictures with captions in 70 languages and speech, from Debian's tuxpaint-stamps-default

Another one is one more such function. It lists what there is as `Candidate`s (a name, captions, and a `place`, which is
anything picklable that says where the bytes are) and hands them to `write_split` with a function that reads one:

    def import_mine(source: Path, out: Path, *, test_share: float = 0.1, seed: int = 0,
                    processes: int | None = None, progress: Progress | None = None) -> Imported:
        refuse_existing(out)
        candidates = [Candidate(name, (caption,), place) for name, caption, place in ...]
        return write_split(out, candidates, read_mine, test_share=test_share, seed=seed,
                           processes=processes, progress=progress)

    def read_mine(candidate: Candidate) -> dict[str, bytes]:
        return image_field(Path(candidate.place).read_bytes())

`read_mine` is a module's own function, so that worker processes can be sent it; it raises DataError or OSError for
what is to be skipped with that reason. `write_split` does the rest: keys, the split by caption, parallel writing, all
or nothing.
"""
