"""The official packages image-reward and hpsv2 at reduced width; run by the Python that has them.

As a script it is a worker like ``official_worker.py``, but with small networks. Weights are a formula of key and shape,
so that they need not be stored. ``make_official_vectors.py`` says how the stored numbers were made.
"""

import importlib
import json
import runpy
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

WORKER = Path(__file__).resolve().parents[2] / "heatkv_cli" / "metrics" / "preference" / "official_worker.py"
VISION = {"embed_dim": 64, "depth": 2, "num_heads": 4}
MED = {
    "vocab_size": 40,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "add_cross_attention": True,
    "model_type": "bert",
    "encoder_width": 64,
}
ARCH = "tiny-hps"
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a an of the photo paint ##ing ##s cat dog red , . - ! cafe 猫 ' very long u ##n"
PROMPTS = (
    "a photo of a cat",
    "A RED dog, painting of the cat!",
    "a very " + "long " * 60 + "photo",
    "café 猫 unpainted cat's dog - xyz",
    "",
)


def vocabulary():
    """Lines of a BERT vocabulary, two short of the network's."""
    words = WORDS.split()
    return words + [f"unused{i}" for i in range(MED["vocab_size"] - 2 - len(words))]


def pictures():
    """Square, wide, tall, exactly the network's size, tiny; (H, W, 3) uint8 by formula."""
    made = []
    for number, (height, width) in enumerate([(64, 64), (90, 160), (250, 97), (224, 224), (17, 23)]):
        y, x = np.mgrid[:height, :width].astype(np.float64)
        waves = [np.sin(x / (3 + c) + number) + np.cos(y / (2 + c)) + np.sin(x * y / 400 + c) for c in range(3)]
        made.append(np.clip(np.stack(waves, 2) * 42 + 128, 0, 255).round().astype(np.uint8))
    return made


def fill(shapes):
    """Weights as a formula of key and shape."""
    state = {}
    for key, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        values = torch.randn(shape, generator=generator)
        if key.endswith("position_ids"):
            values = torch.arange(shape[-1]).reshape(shape)
        elif len(shape) > 1:
            values = values * ((1.0 if key.startswith("mlp") else 2.0) / np.sqrt(np.prod(shape[1:])))
        elif key.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        state[key] = values
    return state


def shapes_of(module):
    return {key: list(value.shape) for key, value in module.state_dict().items()}


def shrink_image_reward():
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer

    official = importlib.import_module("ImageReward.ImageReward")
    mlp = official.MLP
    official.MLP = lambda width: mlp(MED["hidden_size"])
    blip_pretrain.create_vit = lambda *args: (VisionTransformer(img_size=224, **VISION), VISION["embed_dim"])


def shrink_hpsv2(folder):
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    path = Path(folder) / (ARCH + ".json")
    path.write_text(json.dumps(CLIP))
    factory.add_model_config(path)
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda arch, pretrained, **kwargs: create(ARCH, pretrained, **kwargs)


if __name__ == "__main__":
    if sys.argv[1] == "image-reward":
        shrink_image_reward()
    else:
        shrink_hpsv2(Path(json.loads(sys.argv[2])["checkpoint"]).parent)
    runpy.run_path(str(WORKER), run_name="__main__")
