"""Overrides that shrink a released Infinity model to a few layers of a few numbers."""

SMALL_INFINITY = (
    "resolution=0.06M",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.head_dim=16",
    "model.params.width=64",
    "model.params.block_chunks=2",
    "model.params.text_channels=256",
    "model.params.text_length=32",
    "model.params.tokenizer.base_channels=32",
)
