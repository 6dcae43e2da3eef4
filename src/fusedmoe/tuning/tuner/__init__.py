"""Measuring which tiles a layer should use: candidates, a search over them, a timer for GPUs.

``tune`` makes a ``TunedTable``; the command line is ``fusedmoe tune``.
"""
