"""Metrics: pictures, or numbers recorded with them, go in; values with intervals come out.

There is a room for each network or kind: ``inception``, ``lite0``, ``clip``, ``preference``, ``objects``, ``fashion``.
Metrics that need no room are files beside them (``pixels``, ``lpips``, ``kl``). ``base`` has the contract and
``parameters`` its fields; ``scores`` and ``intervals`` have the numbers; ``weights`` finds files, ``networks`` keeps
what was loaded.
"""
