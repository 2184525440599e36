"""Makes ``data/official_scores.json``: what the official packages give for small networks and pictures.

Run by a Python that has image-reward 1.5 and hpsv2x 1.2.0 (the README says how to install them), in this folder:
``python make_official_vectors.py``. Nothing of heatkv takes part.
"""

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import official_tiny as tiny
import torch
from PIL import Image


def image_reward(folder):
    tiny.shrink_image_reward()
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip

    (folder / "vocab.txt").write_text("\n".join(tiny.vocabulary()) + "\n", encoding="utf-8")
    (folder / "med.json").write_text(json.dumps(tiny.MED))
    blip.BertTokenizer.from_pretrained = classmethod(
        lambda cls, name: cls(vocab_file=str(folder / "vocab.txt"), do_lower_case=True)
    )
    model = ImageReward(device="cpu", med_config=str(folder / "med.json")).eval()
    shapes = tiny.shapes_of(model)
    model.load_state_dict(tiny.fill(shapes))
    tokens = [
        model.blip.tokenizer(p, padding="max_length", truncation=True, max_length=35).input_ids for p in tiny.PROMPTS
    ]
    with torch.no_grad():
        scores = [[model.score(p, Image.fromarray(i)) for p in tiny.PROMPTS] for i in tiny.pictures()]
    return {"shapes": shapes, "tokens": tokens, "scores": scores, "pixels": sampled(model.preprocess)}


def hps(folder):
    tiny.shrink_hpsv2(folder)
    from hpsv2 import img_score
    from hpsv2.src.open_clip import transform

    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda arch, _, **kwargs: create(arch, None, **kwargs)
    img_score.initialize_model()
    shapes = tiny.shapes_of(img_score.model_dict["model"])
    torch.save({"epoch": 0, "name": "tiny", "state_dict": tiny.fill(shapes)}, folder / "hps.pt")
    out = {"shapes": shapes}
    resize = transform.F.resize
    for antialias in (True, False):
        transform.F.resize = lambda img, size, mode, on=antialias: resize(img, size, mode, antialias=on)
        key = "antialias" if antialias else "no_antialias"
        out[key] = {
            "scores": [
                [float(img_score.score(Image.fromarray(i), p, cp=str(folder / "hps.pt"))[0]) for p in tiny.PROMPTS]
                for i in tiny.pictures()
            ],
            "pixels": sampled(img_score.model_dict["preprocess_val"]),
        }
    return out


def sampled(preprocess):
    """Every 997th number of each preprocessed picture."""
    return [preprocess(Image.fromarray(i)).flatten()[::997].tolist() for i in tiny.pictures()]


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = {"image_reward": image_reward(Path(name)), "hps": hps(Path(name))}
    names = ("image-reward", "hpsv2x", "torch", "torchvision", "transformers", "timm", "pillow")
    found["versions"] = {name: metadata.version(name) for name in names}
    target = Path(__file__).parent / "data" / "official_scores.json"
    target.write_text(json.dumps(rounded(found), separators=(",", ":")) + "\n")
    print(target, target.stat().st_size, "bytes", file=sys.stderr)
