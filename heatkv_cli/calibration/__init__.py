"""Attention statistics, measured once per model, from which every calibrated method starts.

`statistics` watches a full-cache run, `calibration` holds what it saw, `artifact_file` reads and writes such files.
"""
