"""The archive of a release has what WebUI users need, and neither tests nor lab."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RUN_OR_READ = ("scripts", "tomesd_core", "javascript", "localizations", "docs")
RUN_OR_READ += ("install.py", "style.css", "metadata.ini", "README.md")
"""Files that WebUI runs or its users read."""


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def test_it_holds_every_file_that_users_need_and_no_lab_and_no_tests():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    # The last commit, by the current attributes.
    archive = git("archive", "--worktree-attributes", "HEAD")
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        archived = {member.name for member in files if member.isfile()}
    needed = {*git("ls-files", *RUN_OR_READ).decode().splitlines()} - {"docs/index-entry.json"}
    assert len(needed) > 40
    assert needed - archived == set()
    assert {"LICENSE", "CHANGELOG.md"} <= archived
    folders = {name.split("/")[0] for name in archived}
    assert folders & {"lab", "tests", ".ci", ".github", "noxfile.py"} == set()
