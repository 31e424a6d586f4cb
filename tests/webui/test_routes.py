"""The extension's routes: their answers, and the login that WebUI was started with."""

from __future__ import annotations

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from gradio.routes import App
from starlette.testclient import TestClient

from tomesd_core.version import VERSION

ROUTES = ("/tome/presets", "/tome/status")


@pytest.fixture
def start(host):
    """A client of an app with logins; without a page (`--nowebui`) the app isn't gradio's."""

    def client(api_auth=None, gradio_auth=None, has_page=True):
        host.demo.auth = gradio_auth
        app = App.create_app(host.demo) if has_page else FastAPI()
        add_api(app, api_auth)
        host.start_app(app)
        return TestClient(app)

    yield client
    host.demo.auth = None


def add_api(app, users):
    """Add a route of WebUI's API, which has a login with `--api-auth`."""

    def check(credentials: HTTPBasicCredentials = Depends(HTTPBasic())):  # noqa: B008 - FastAPI's way
        if users.get(credentials.username) != credentials.password:
            raise HTTPException(401)

    app.get("/sdapi/v1/memory", dependencies=[Depends(check)] if users else [])(lambda: {})


def answers(client, **request):
    posted = client.post("/tome/measure", json={"width": 0}, **request).status_code
    return {client.get(route, **request).status_code for route in ROUTES} | {
        200 if posted == 422 else posted
    }


@pytest.mark.parametrize("has_page", [True, False])
def test_without_a_login_they_are_open(start, has_page):
    assert answers(start(has_page=has_page)) == {200}


@pytest.mark.parametrize(
    "others",
    [{}, {"gradio_auth": [("third", "2")]}, {"has_page": False}],
    ids=["as for WebUI's own API", "before the page's login", "without a page"],
)
def test_the_apis_credentials(start, others):
    client = start(api_auth={"user": "secret", "second": "2"}, **others)
    assert answers(client) == {401}
    assert answers(client, auth=("user", "wrong")) == answers(client, auth=("third", "2")) == {401}
    for right in (("user", "secret"), ("second", "2")):
        assert answers(client, auth=right) == {200}


def test_the_pages_login(start):
    client = start(gradio_auth=[("user", "secret"), ("second", "2")])
    assert answers(client) == {client.get("/config").status_code} == {401}
    assert answers(client, auth=("user", "secret")) == {401}, "not basic authentication"
    assert answers(client, headers={"Cookie": "access-token=guessed"}) == {401}
    assert client.post("/login", data={"username": "user", "password": "wrong"}).status_code == 400
    assert answers(client) == {401}
    assert client.post("/login", data={"username": "second", "password": "2"}).status_code == 200
    assert answers(client) == {client.get("/config").status_code} == {200}


def test_their_answers(start, make):
    client = start(has_page=False)
    presets = {preset["name"]: preset for preset in client.get("/tome/presets").json()}
    assert presets["Fast"]["description"] and presets["Fast"]["settings"]["max_downsample"] == 2
    make([True, 0.6, 0.3, "linear"], steps=1)
    status = client.get("/tome/status").json()
    assert status["version"] == VERSION
    assert [layer["level"] for layer in status["layers"]] == [1, 2, 1, 1]
    assert (status["settings"]["ratio"], status["settings"]["late_ratio"]) == (0.6, 0.3)
    make([False], steps=1)
    assert client.get("/tome/status").json()["settings"] is None
