"""Stands in for WebUI's `modules.api`."""
