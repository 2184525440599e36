"""Metrics: pictures, or numbers recorded with them, go in; values with intervals come out.

There is a room for each network or kind: ``inception``, ``lite0``, ``clip``, ``preference``, ``objects``. Metrics that
need no room are files beside them (``pixels``, ``lpips``, ``kl``). ``base`` has the contract, ``parameters`` the
fields, ``scores`` and ``intervals`` the numbers, ``weights`` the files on disk, ``networks`` the networks in memory.
"""
