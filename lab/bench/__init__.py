"""Measures merging on this machine, next to the peers that are installed: `python -m lab.bench`."""
