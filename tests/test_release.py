"""The archive of a release has what WebUI users need, and neither tests nor lab."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RUN_OR_READ = (
    "scripts",
    "tomesd_core",
    "javascript",
    "localizations",
    "docs",
    "install.py",
    "style.css",
    "metadata.ini",
    "README.md",
)
"""Files that WebUI runs or its users read."""


@pytest.fixture(scope="module")
def archived():
    """Names of the files in an archive of the last commit, by the current attributes."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    command = ["git", "archive", "--worktree-attributes", "HEAD"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        return {member.name for member in files if member.isfile()}


def test_it_holds_every_file_that_users_need(archived):
    tracked = subprocess.run(
        ["git", "ls-files", *RUN_OR_READ], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    needed = set(tracked.stdout.decode().split("\n")) - {"", "docs/index-entry.json"}
    assert len(needed) > 40
    assert needed - archived == set()
    assert {"LICENSE", "CHANGELOG.md"} <= archived


def test_it_holds_no_lab_and_no_tests(archived):
    assert {name.split("/")[0] for name in archived} & {
        "lab",
        "tests",
        ".ci",
        ".github",
        "noxfile.py",
    } == set()
