"""Scores pictures with an official package; run by another Python than heatkv's, see ``official.py``.

Imports nothing of heatkv, only the standard library and the package it is asked for. Python 3.8 suffices.
``python official_worker.py PACKAGE OPTIONS``, OPTIONS a JSON object:

    hpsv2         checkpoint, release ("v2.1"), device
    image-reward  checkpoint, med_config, vocab (None: bert-base-uncased from the hub, at BERT_COMMIT), device
"""

from __future__ import annotations

# mypy: ignore-errors
import base64
import io
import json
import os
import sys
from importlib import metadata

PROTOCOL = 1
BERT_COMMIT = "86b5e0934494bd15c9632b12f734a8a67f723594"
DISTRIBUTIONS = ("hpsv2", "hpsv2x", "image-reward", "torch", "torchvision", "transformers", "timm", "pillow")


def load_hpsv2(options):
    """Return ``score(image, prompt)`` of hpsv2's ``img_score``.

    Two things of the package are changed: it does not fetch the LAION weights that the checkpoint overwrites at once,
    and it reads the checkpoint once and not for every picture.
    """
    import torch
    from hpsv2 import img_score

    create, read, was_read = img_score.create_model_and_transforms, torch.load, []

    def read_once(path, *args, **kwargs):
        if path != options["checkpoint"]:
            return read(path, *args, **kwargs)
        if was_read:
            return {"state_dict": None}
        was_read.append(path)
        return read(path, *args, **kwargs)

    img_score.create_model_and_transforms = lambda arch, _, **kwargs: create(arch, None, **kwargs)
    img_score.device = options.get("device", "cpu")
    torch.load = read_once

    def score(image, prompt):
        found = img_score.score(image, prompt, cp=options["checkpoint"], hps_version=options["release"])[0]
        img_score.model_dict["model"].load_state_dict = lambda state: None  # it holds the checkpoint from now on
        return float(found)

    return score


def load_image_reward(options):
    """Return ``score(image, prompt)`` of the package's model.

    One thing of the package is changed: its tokenizer is the file ``vocab`` or, without one, that of a fixed commit.
    """
    import ImageReward
    import torch
    from ImageReward.models.BLIP import blip

    tokenizer = blip.BertTokenizer
    if options.get("vocab"):
        tokenizer.from_pretrained = classmethod(lambda cls, name: cls(vocab_file=options["vocab"], do_lower_case=True))
    else:
        fetch = tokenizer.from_pretrained
        tokenizer.from_pretrained = classmethod(lambda cls, name: fetch(name, revision=BERT_COMMIT))
    device = options.get("device", "cpu")
    model = ImageReward.load(options["checkpoint"], device=device, med_config=options["med_config"])

    def score(image, prompt):
        with torch.no_grad():
            return float(model.score(prompt, image))

    return score


LOADERS = {"hpsv2": load_hpsv2, "image-reward": load_image_reward}


def main():
    """Greet, then answer line by line until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print goes to stderr, so that only answers are on stdout

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    package, options = sys.argv[1], json.loads(sys.argv[2])
    try:
        score = LOADERS[package](options)
    except BaseException as error:
        say({"fatal": describe(error)})
        raise
    from PIL import Image

    say({"ready": package, "protocol": PROTOCOL, "versions": versions()})
    for line in sys.stdin:
        request = {}
        try:
            request = json.loads(line)
            image = Image.open(io.BytesIO(base64.b64decode(request["image"]))).convert("RGB")
            say({"id": request["id"], "score": score(image, request["prompt"])})
        except Exception as error:
            say({"id": request.get("id"), "error": describe(error)})


def describe(error):
    """Return one line for an exception."""
    return type(error).__name__ + ": " + " ".join(str(error).split())[:500]


def versions():
    """Versions of what takes part, as far as it is installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
