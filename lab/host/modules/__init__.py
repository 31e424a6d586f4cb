"""Stands in for WebUI's `modules` package: only what an extension of this kind uses, under the same names."""
