"""Measures merging on this machine, beside the peers that are installed: `python -m lab.bench`."""
