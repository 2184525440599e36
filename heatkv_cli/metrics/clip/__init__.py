"""CLIP networks through open_clip, their input, and the CLIP score."""
