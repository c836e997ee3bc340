"""A finished run as a plain model: what the README's three lines of Python give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import ImageTransform, decode_image, open_dataset
from data_pipeline.scenes.synth import synthesise
from pretrain import load_model
from pretrain.cli import main
from pretrain.errors import RequestError
from pretrain.metrics import read_lines


def test_a_run_is_loaded_and_scores_what_the_run_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesise(tmp_path / "scenes", train=48, test=24, size=32, sound=False, processes=1)
    run = tmp_path / "run"
    small = ["model.vision.layers=1", "model.text.layers=1", "model.vision.image_size=32", "model.text.vocab_size=300"]
    data = [f"data.train={tmp_path / 'scenes' / 'train'}", f"data.test={tmp_path / 'scenes' / 'test'}"]
    brief = ["train.steps=4", "train.warmup=1", "train.global_batch=16", "data.workers=0", f"run.dir={run}"]
    assert main(["train", "quickstart", *data, *small, *brief]) == 0

    model, tokenizer, recipe = load_model(run)
    assert recipe.run.dir == run
    test = open_dataset(tmp_path / "scenes" / "test")
    resize = ImageTransform(recipe.model.vision.image_size)
    images = torch.stack([resize(decode_image(test.read(i).fields["jpg"]), None) for i in range(24)])
    captions = [(i, caption) for i in range(24) for caption in test.read(i).captions()]
    tokens = tokenizer.encode_batch([caption for _, caption in captions], recipe.model.text.context)
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(torch.from_numpy(tokens.astype(np.int64)))
    similarity = image @ text.T
    own = torch.tensor([[i == image for image, _ in captions] for i in range(24)])
    best = similarity.masked_fill(~own, -2).amax(1, keepdim=True)
    r5 = float((((similarity >= best) & ~own).sum(1) < 5).double().mean())
    scored = read_lines(run / "evaluation.jsonl")[-1]["retrieval"]
    assert r5 == pytest.approx(scored["image_to_text"]["r5"], abs=1 / 24 + 1e-9)  # a near tie may fall either way

    capsys.readouterr()
    assert main(["eval", str(run), "--task", "retrieval", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["scores"]["retrieval"], told["problem"]) == (scored, None)
    assert main(["checkpoint", "verify", str(run)]) == 0
    with pytest.raises(RequestError, match="no checkpoint"):
        load_model(tmp_path / "scenes")
