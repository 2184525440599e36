"""Infinity (bitwise next-scale text-to-image, arXiv 2412.04431): tokenizer, transformer, sampling, the model object.

State-dict names are the official ones (FoundationVision/Infinity @ 4c27bbb), so official checkpoints load as they are.
"""
