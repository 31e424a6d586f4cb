"""`python -m lab.host --port 7860 [--api-auth user:password]`: the page and the API, until Ctrl-C."""

from __future__ import annotations

import argparse

from lab.demo.model import TinyModel
from lab.host import Host, start


def load_model() -> TinyModel:
    """The trained model; without its weights, it says so and gives a random one."""
    try:
        return TinyModel.load()
    except FileNotFoundError as e:
        print(f"No trained model ({e}); going on with random weights.")
        return TinyModel.random()


def serve(host: Host, port: int | None) -> None:
    """Serves the page and the API until Ctrl-C. Exits where the port is taken."""
    try:
        address = host.serve(port)
    except OSError as e:
        raise SystemExit(f"The page can't be served: {e}") from e
    try:
        print(f"The page: {address} (Ctrl-C ends it)", flush=True)
        host.wait()
    except KeyboardInterrupt:
        print("Stopping.")


def main() -> None:
    """Starts the host with the tiny model."""
    parser = argparse.ArgumentParser(prog="python -m lab.host", description="A miniature WebUI.")
    parser.add_argument("--port", type=int, default=7860, help="port of the page and of the API (default: 7860)")
    parser.add_argument("--api-auth", metavar="USER:PASSWORD", help="credentials that the API asks for")
    parser.add_argument("--data-dir", help="where settings go (default: a temporary folder)")
    parser.add_argument("--theme", choices=["light", "dark"], help="the page's colours (default: the browser's)")
    parser.add_argument("--extension", action="append", help="an extension's folder (default: this project)")
    parser.add_argument("--random", action="store_true", help="random weights in place of the trained ones")
    args = parser.parse_args()
    model = TinyModel.random() if args.random else load_model()
    with start(model, args.extension, args.data_dir, api_auth=args.api_auth, theme=args.theme) as host:
        serve(host, args.port)


if __name__ == "__main__":
    main()
