"""VAR: class-conditional next-scale prediction over a multi-scale vector-quantised tokenizer.

Source: FoundationVision/VAR.
"""
