"""Bring other people's data in -> OUT/train and OUT/test, and OUT/val where a data set has three parts.

Each importer is one module with one function, `import_<name>(source, out, ...) -> Imported`:
  folder.py       images with captions beside them or in a table (caption_files.py), or in one folder a class
  table.py        CSV, TSV or Parquet with a column of images and one of captions
  tuxpaint.py     real pictures with captions in 70 languages and speech, from Debian's tuxpaint-stamps-default
  coco.py  flickr30k.py  img2dataset.py          published data sets: images with captions,
  vqav2.py  gqa.py  vcr.py                       images with questions (their form: questions.py),
  librispeech.py  manifest.py                    speech with transcripts,
  clotho.py  audiocaps.py                        sounds with captions
What they share:
  gather.py       finding the files that annotations name, provenance, one way to run an importer
  annotations.py  JSON, JSON lines, CSV, of which nothing is trusted
  image.py sound.py questions.py                 bytes -> field; the form of questions
  captions.py leftovers.py                       what is no caption; what is left out, which is always told
  split.py hold_out.py                           keys, the split, writing; what is held out

Another published data set is one more function that gathers: see gather.py, which has one to start from. Whatever else
there is to import lists `Candidate`s (a name, captions, and a `place`, which is anything picklable that says where the
bytes are) and hands them to `write_split` with a function that reads one:

    def import_mine(source: Path, out: Path, *, test_share: float = 0.1, seed: int = 0,
                    processes: int | None = None, on: str | None = None,
                    progress: Progress | None = None) -> Imported:
        request = Request.of("mine", source, test_share=test_share, seed=seed)
        refuse_existing(out, request)
        candidates = [Candidate(name, (caption,), place) for name, caption, place in ...]
        return write_split(out, candidates, read_mine, test_share=test_share, seed=seed, request=request,
                           processes=processes, on=on, reads=[source], progress=progress)

    def read_mine(candidate: Candidate) -> dict[str, bytes]:
        return image_field(Path(candidate.place).read_bytes())

`read_mine` is a module's own function, so that workers, here or on a Ray, can be sent it; it raises DataError or
OSError for what is to be skipped with that reason. `write_split` does the rest: keys, the split, parallel writing, all
or nothing, going on after a kill.
"""
