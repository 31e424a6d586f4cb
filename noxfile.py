"""The project's commands: `nox -s demo`, `tests`, `lint`, `live`, `bench`, and pinned tests."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

# The original ldm code. Its pins are old, and the parts used here don't need them.
LDM = ("stable-diffusion-sdkit==2.1.5",)
LDM_NEEDS = ("einops", "omegaconf", "safetensors", "tqdm")

# gradio 3.41.2, which WebUI pins, and versions of its dependencies that work with it.
PAGE = (
    "gradio==3.41.2",
    "gradio_client==0.5.0",
    "fastapi==0.94.0",
    "starlette==0.26.1",
    "pydantic==1.10.26",
    "httpx==0.24.1",
    "httpcore==0.17.3",
    "huggingface_hub==0.20.3",
    "websockets==11.0.3",
    "uvicorn==0.29.0",
    "h11==0.14.0",
    "anyio==4.16.0",
    "markupsafe==2.1.5",
    "pillow==10.4.0",
    "altair==5.4.1",
    "pandas==2.2.3",
    "matplotlib==3.9.4",
)
TESTS = (
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "tomesd==0.1.3",
    "playwright",
    "psutil",
    "scikit-image",
)

# The packages of WebUI 1.10.1.
WEBUI_PINS = ("torch==2.1.2", "numpy==1.26.2")
CURRENT = ("torch==2.13.0", "numpy<2")
# The packages of Forge Neo. gradio 3 declares numpy 1 and modules that Python has dropped, but
# works with these.
NEO_PINS = ("torch==2.11.0", "numpy==2.3.5")
NEO_PAGE = (
    *(pin for pin in PAGE if not pin.startswith(("gradio==", "altair", "markupsafe"))),
    "altair==5.5.0",
    "setuptools==75.8.0",
    *(
        "aiofiles",
        "audioop-lts",
        "ffmpy",
        "importlib_resources<7",
        "jinja2",
        "orjson",
        "pydub",
        "python-multipart",
    ),
    *("pyyaml", "requests", "semantic-version"),
)

# The packages of Forge, and of reForge's branches on gradio 4.
FORGE_PINS = (
    "gradio==4.40.0",
    "fastapi==0.104.1",
    "pydantic==2.8.2",
    "huggingface_hub==0.26.2",
    "httpx==0.24.1",
    "pillow==9.5.0",
)

# The current diffusers and the one of 2024, each with packages of its time.
DIFFUSERS_PINS = {
    "current": ("diffusers==0.42.1", "transformers==5.24.0", "accelerate==1.15.0", "peft==0.21.2"),
    "2024": (
        "diffusers==0.31.0",
        "transformers==4.46.3",
        "huggingface_hub==0.26.2",
        "accelerate==1.1.1",
        "peft==0.13.2",
    ),
}

CODE = ("tomesd_core", "scripts", "lab", "tests")
MOST_LINES = 320
"""The longest module that `lint` accepts."""


def _install(session: nox.Session, *packages: str) -> None:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = (session.run("python", "-c", code, silent=True) or "3.11").strip()
    if version == "3.13":
        session.install(*NEO_PINS, *LDM_NEEDS, *NEO_PAGE, *packages)
        session.install("--no-deps", *LDM, PAGE[0])
        return
    if version not in ("3.10", "3.11"):
        session.error(
            f"Python 3.10, 3.11 or 3.13 is needed, as for WebUI or Forge Neo; this is {version}"
        )
    pins = WEBUI_PINS if version == "3.10" else CURRENT
    session.install(*pins, *LDM_NEEDS, *PAGE, *packages)
    session.install("--no-deps", *LDM)


def _test(session: nox.Session) -> None:
    _install(session, *TESTS)
    # ca-tome requires an older torch, and diffusers, which its patch doesn't use.
    session.install("--no-deps", "ca-tome==0.1.3")
    # The tests' tensors are small, so one process per core is faster than threads. In order, the
    # slow files run first and the many quick ones last.
    parallel = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
    env = {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", *(session.posargs or parallel), env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no running WebUI."""
    _test(session)


@nox.session(python="3.10" if sys.version_info[:2] != (3, 10) else None)
def webui_pins(session: nox.Session) -> None:
    """The same tests with the packages of WebUI 1.10.1: Python 3.10, torch 2.1.2, gradio 3.41.2."""
    _test(session)


@nox.session
def forge_pins(session: nox.Session) -> None:
    """The panel, and the differences between hosts, with Forge's gradio 4.40.0; needs no WebUI."""
    session.install(*CURRENT, *FORGE_PINS, "pytest", "playwright")
    env = {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    tests = session.posargs or ("tests/seam",)
    session.run("python", "-m", "pytest", *tests, env=env)


@nox.session
@nox.parametrize("pins", [nox.param(pins, id=name) for name, pins in DIFFUSERS_PINS.items()])
def diffusers_pins(session: nox.Session, pins: tuple[str, ...]) -> None:
    """The library, installed as a wheel, in diffusers, next to tomesd."""
    shutil.rmtree("build", ignore_errors=True)  # The wheel would include deleted files from it.
    session.install(*CURRENT, *pins, "tomesd==0.1.3", "pytest", "pytest-xdist", ".")
    env = {"OMP_NUM_THREADS": "1"}
    # Run elsewhere, so that the installed wheel is imported, not this folder.
    tests = os.path.abspath("tests/library")
    session.chdir(session.create_tmp())
    session.run(
        "python",
        "-m",
        "pytest",
        "-n",
        "auto",
        "--confcutdir",
        tests,
        tests,
        *session.posargs,
        env=env,
    )


@nox.session
def demo(session: nox.Session) -> None:
    """A page with the panel and a tiny model; with a prompt, the pictures only."""
    _install(session)
    env = {"GRADIO_ANALYTICS_ENABLED": "False"}
    # Ctrl-C reaches the page too, which needs a moment to shut down.
    session.run("python", "-m", "lab.demo", *session.posargs, env=env, interrupt_timeout=20)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy --strict over the product, and the length of modules."""
    session.install(
        "ruff==0.17.6",
        "mypy==2.4.1",
        *CURRENT,
        "pillow==10.4.0",
        "fastapi==0.94.0",
        "pydantic==1.10.26",
    )
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "--strict", "tomesd_core")
    files = [path for folder in CODE for path in Path(folder).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    if long := [f"{path}: {lines}" for path, lines in lengths.items() if lines > MOST_LINES]:
        session.error(f"modules of more than {MOST_LINES} lines: {', '.join(long)}")


@nox.session
def live(session: nox.Session) -> None:
    """Tests of the WebUI at WEBUI_URL, over its API and, with Chromium, its page."""
    if not os.environ.get("WEBUI_URL"):
        session.error("WEBUI_URL must be the address of a WebUI with --api: http://127.0.0.1:7860")
    session.install("pytest", "requests", "webuiapi", "playwright", "pillow", "psutil")
    session.run("python", "-m", "pytest", "--confcutdir=tests/live", "tests/live", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """A short benchmark of this machine, next to tomesd."""
    _install(session, "psutil", "tomesd==0.1.3", "scikit-image")
    session.run("python", "-m", "lab.bench", *(session.posargs or ("speed", "--quick")))
