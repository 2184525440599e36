"""What is measured of a model once, from which every calibrated method starts.

`statistics` watches a full-cache run, `calibration` holds what it saw, `artifact_file` is how such things lie on disk.
"""
