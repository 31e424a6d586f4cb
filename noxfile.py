"""The project's commands: `nox -s demo`, `tests`, `lint`, `live`, `bench`, and the tests with the
pins of others."""

from __future__ import annotations

import os
import shutil
import sys

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

# The original ldm code. Its own pins are old and not needed for what is used of it.
LDM = ("stable-diffusion-sdkit==2.1.5",)
LDM_NEEDS = ("einops", "omegaconf", "safetensors", "tqdm")

# gradio 3.41.2, the version that WebUI pins, with the versions around it that it still works with.
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

# What users of WebUI 1.10.1 have.
WEBUI_PINS = ("torch==2.1.2", "numpy==1.26.2")
CURRENT = ("torch==2.13.0", "numpy<2")
# What Forge Neo has. gradio 3 asks for numpy 1 and for modules that Python no longer has, and runs
# with these.
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

# What Forge pins, and its reForge branches on gradio 4.
FORGE_PINS = (
    "gradio==4.40.0",
    "fastapi==0.104.1",
    "pydantic==2.8.2",
    "huggingface_hub==0.26.2",
    "httpx==0.24.1",
    "pillow==9.5.0",
)

# diffusers of today and of two years ago, with what each needs of its time.
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


def _install(session: nox.Session, *packages: str) -> None:
    version = session.run(
        "python", "-c", "import sys; print('%d.%d' % sys.version_info[:2])", silent=True
    ).strip()
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
    session.install(
        "--no-deps", "ca-tome==0.1.3"
    )  # It asks for an older torch, and for diffusers, which is not used.
    # Each test's tensors are small: a process a core is faster than two threads in one.
    parallel = ("-n", "auto", "--dist", "loadfile") if not session.posargs else ()
    env = {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", *parallel, *session.posargs, env=env)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no running WebUI."""
    _test(session)


@nox.session(python="3.10" if sys.version_info[:2] != (3, 10) else None)
def webui_pins(session: nox.Session) -> None:
    """The same tests with what users of WebUI 1.10.1 have: Python 3.10, torch 2.1.2, numpy 1.26.2,
    gradio 3.41.2."""
    _test(session)


@nox.session
def forge_pins(session: nox.Session) -> None:
    """The panel and the seam with Forge's gradio 4.40.0 and what Forge pins around it; they need no
    WebUI."""
    session.install(*CURRENT, *FORGE_PINS, "pytest", "playwright")
    env = {"GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    tests = session.posargs or ("tests/seam",)
    session.run("python", "-m", "pytest", *tests, env=env)


@nox.session
@nox.parametrize("pins", [nox.param(pins, id=name) for name, pins in DIFFUSERS_PINS.items()])
def diffusers_pins(session: nox.Session, pins: tuple[str, ...]) -> None:
    """The library, installed as a wheel, on UNets and pipelines of diffusers, beside tomesd."""
    shutil.rmtree("build", ignore_errors=True)  # A wheel would take files along that are no more.
    session.install(*CURRENT, *pins, "tomesd==0.1.3", "pytest", "pytest-xdist", ".")
    env = {"OMP_NUM_THREADS": "1"}
    # From elsewhere, and without this folder on the path: what is imported is what was installed.
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
    """A page with the panel and a tiny model; with a prompt, the pictures alone."""
    _install(session)
    env = {"GRADIO_ANALYTICS_ENABLED": "False"}
    # Ctrl-C reaches the page too, which needs a moment to end by itself.
    session.run("python", "-m", "lab.demo", *session.posargs, env=env, interrupt_timeout=20)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff check, ruff format, and mypy --strict over the product."""
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


@nox.session
def live(session: nox.Session) -> None:
    """Drives the WebUI that WEBUI_URL names, through its API and, with Chromium, its page."""
    if not os.environ.get("WEBUI_URL"):
        session.error(
            "WEBUI_URL must name a running WebUI, started with --api: WEBUI_URL=http://127.0.0.1:7860"
        )
    session.install("pytest", "requests", "webuiapi", "playwright", "pillow", "psutil")
    session.run("python", "-m", "pytest", "--confcutdir=tests/live", "tests/live", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """A short benchmark of this machine, beside tomesd."""
    _install(session, "psutil", "tomesd==0.1.3", "scikit-image")
    session.run("python", "-m", "lab.bench", *(session.posargs or ("speed", "--quick")))
