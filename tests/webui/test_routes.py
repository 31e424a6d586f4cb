"""The extension's own routes: they ask for whatever login WebUI was started with."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

ROUTES = ("/tome/presets", "/tome/status")


@pytest.fixture
def restart(host):
    """Starts page and API anew with logins as on WebUI's command line; gives a client."""
    from gradio.routes import App
    from modules import shared

    def start(api_auth=None, gradio_auth=None):
        shared.cmd_opts.api_auth = api_auth
        host.reload_ui()
        host.demo.auth = gradio_auth
        host._start_app(App.create_app(host.demo))
        return TestClient(host.app)

    yield start
    shared.cmd_opts.api_auth = None
    host.reload_ui()
    assert host.app


def answers(client, **request):
    return {client.get(route, **request).status_code for route in ROUTES}


def test_without_a_login_they_are_open(restart):
    assert answers(restart()) == {200}


def test_the_apis_credentials(restart):
    client = restart(api_auth="user:secret,second:2")
    assert answers(client) == {401}
    assert answers(client, auth=("user", "wrong")) == answers(client, auth=("third", "2")) == {401}
    assert answers(client, auth=("user", "secret")) == answers(client, auth=("second", "2")) == {200}


def test_the_pages_login(restart):
    client = restart(gradio_auth=[("user", "secret"), ("second", "2")])
    assert answers(client) == {client.get("/config").status_code} == {401}
    assert answers(client, auth=("user", "secret")) == {401}, "it is no basic authentication"
    assert answers(client, headers={"Cookie": "access-token=guessed"}) == {401}
    assert client.post("/login", data={"username": "user", "password": "wrong"}).status_code == 400
    assert answers(client) == {401}
    assert client.post("/login", data={"username": "second", "password": "2"}).status_code == 200
    assert answers(client) == {client.get("/config").status_code} == {200}


def test_with_both_the_apis_credentials_as_for_webuis_own_api(restart):
    client = restart(api_auth="user:secret", gradio_auth=[("second", "2")])
    assert client.get("/sdapi/v1/samplers").status_code == 401
    assert answers(client) == {401}
    assert client.get("/sdapi/v1/samplers", auth=("user", "secret")).status_code == 200
    assert answers(client, auth=("user", "secret")) == {200}


@pytest.mark.parametrize(("api_auth", "open_to_all"), [(None, 200), ("user:secret", 401)])
def test_an_app_without_a_page(host, monkeypatch, api_auth, open_to_all):
    """`--nowebui`: no gradio, so no login of its."""
    from modules import script_callbacks, shared

    monkeypatch.setattr(shared.cmd_opts, "api_auth", api_auth)
    app = FastAPI()
    script_callbacks.app_started_callback(None, app)
    client = TestClient(app)
    assert answers(client) == {open_to_all}
    assert answers(client, auth=("user", "secret")) == {200}
