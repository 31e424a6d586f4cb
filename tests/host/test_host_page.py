"""The page and the API, without a browser."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from lab.host import Host

REQUEST = {"prompt": "cat", "steps": 2, "width": 16, "height": 16, "seed": 1, "sampler_name": "Euler"}


@pytest.fixture
def client(host: Host, recorded) -> TestClient:
    return TestClient(host.app, raise_server_exceptions=False)


@pytest.fixture
def generate_by_api(client, recorded):
    """Posts a request; returns the reply and the recorder's arguments."""

    def post(tab: str = "txt2img", **request):
        arguments = []
        recorded.actions["process"] = lambda p, *args: arguments.append(args)
        reply = client.post(f"/sdapi/v1/{tab}", json={**REQUEST, **request})
        return reply, arguments[-1] if arguments else None

    return post


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_txt2img(generate_by_api):
    reply, arguments = generate_by_api(unknown_field=1)
    assert reply.status_code == 200
    body = reply.json()
    assert set(body) == {"images", "parameters", "info"}
    info = json.loads(body["info"])
    picture = opened(body["images"][0])
    assert picture.info["parameters"] == info["infotexts"][0]
    assert (picture.size, info["seed"], body["parameters"]["steps"]) == ((16, 16), 1, 2)
    assert arguments == ("nothing", 0.5), "always-on scripts run for requests that do not mention them"


def test_always_on_arguments_are_positional(generate_by_api):
    _, arguments = generate_by_api(alwayson_scripts={"rEcOrDeR": {"args": ["said"]}})
    assert arguments == ("said", 0.5)
    _, arguments = generate_by_api(alwayson_scripts={"Recorder": {"args": ["said", "no number", "too many"]}})
    assert arguments == ("said", "no number")
    reply, _ = generate_by_api(alwayson_scripts={"Nobody": {"args": []}})
    assert (reply.status_code, reply.json()["detail"]) == (422, "Script 'Nobody' not found")
    reply, _ = generate_by_api(alwayson_scripts={"X/Y/Z plot": {"args": []}})
    assert reply.status_code == 422


def test_infotext_field(generate_by_api):
    infotext = (
        "dog\nNegative prompt: cat\nSteps: 3, Sampler: Heun, Seed: 7, Size: 24x16, Recorder note: from text, NGMS: 0.5"
    )
    reply, arguments = generate_by_api(prompt="cat", infotext=infotext)
    parameters = reply.json()["parameters"]
    assert parameters["prompt"] == "cat", "what the request sets wins"
    assert (parameters["negative_prompt"], parameters["override_settings"]) == ("cat", {"s_min_uncond": 0.5})
    assert arguments == ("from text", 0.5)


def test_img2img(client, recorded, generate_by_api):
    first = generate_by_api()[0].json()["images"][0]
    body = generate_by_api("img2img", init_images=[first], denoising_strength=0.5)[0].json()
    assert opened(body["images"][0]).info["parameters"].endswith("Denoising strength: 0.5")
    assert body["parameters"]["init_images"] is None
    assert generate_by_api("img2img")[0].status_code == 404


def test_a_failing_request(host, client, generate_by_api):
    def fail(*_):
        raise ValueError("on purpose")

    handle = host.sd_model.model.diffusion_model.register_forward_hook(fail)
    reply, _ = generate_by_api()
    handle.remove()
    assert reply.status_code == 500
    assert reply.json() == {"error": "ValueError", "detail": "", "body": "", "errors": "on purpose"}
    assert generate_by_api()[0].status_code == 200


def test_a_request_may_come_before_the_api_is_there(host):
    from modules import call_queue
    from modules.api.api import Api

    app = FastAPI()
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/sdapi/v1/samplers").status_code == 404
    Api(app, call_queue.queue_lock)
    app.middleware_stack = app.build_middleware_stack()
    assert client.get("/sdapi/v1/samplers").status_code == 200
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "missing"}).json()["error"] == "RuntimeError"


def test_progress_and_interrupt(client, recorded):
    seen = []

    def watch(_):
        seen.append(client.get("/sdapi/v1/progress").json())
        client.post("/sdapi/v1/interrupt")

    recorded.actions["cfg_denoiser"] = watch
    assert client.post("/sdapi/v1/txt2img", json={**REQUEST, "steps": 4}).status_code == 200
    assert len(seen) == 1
    assert seen[0]["progress"] > 0
    assert seen[0]["state"]["job_count"] == 1
    idle = client.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["state"]["interrupted"]) == (0, True)


def test_lists(client):
    infos = client.get("/sdapi/v1/script-info").json()
    info = next(i for i in infos if i["name"] == "recorder" and i["is_img2img"])
    assert info["is_alwayson"]
    level = {"label": "Recorder level", "value": 0.5, "minimum": 0.0, "maximum": 1.0, "step": 0.1, "choices": None}
    assert info["args"][1] == level
    assert client.get("/sdapi/v1/scripts").json()["txt2img"][:2] == ["x/y/z plot", "recorder"]
    assert [m["model_name"] for m in client.get("/sdapi/v1/sd-models").json()] == ["base", "twin", "other"]
    assert {"Euler a", "Heun", "PLMS"} < {s["name"] for s in client.get("/sdapi/v1/samplers").json()}


def test_png_info(client, generate_by_api):
    picture = generate_by_api()[0].json()["images"][0]
    body = client.post("/sdapi/v1/png-info", json={"image": f"data:image/png;base64,{picture}"}).json()
    assert body["info"].startswith("cat\nSteps: 2")
    assert body["parameters"]["Size-1"] == "16"


def test_options(host, client):
    assert client.get("/sdapi/v1/options").json()["recorder_flag"] is False
    assert client.post("/sdapi/v1/options", json={"recorder_flag": True}).status_code == 200
    from modules import shared

    with open(shared.config_filename, encoding="utf8") as file:
        assert json.load(file)["recorder_flag"] is True
    client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "twin"})
    assert host.sd_model.sd_checkpoint_info.model_name == "twin"
    client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "base"})
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "missing"}).status_code == 500


def test_credentials(host, recorded):
    from modules import shared

    shared.cmd_opts.api_auth = "user:pass:word,second:2"
    host.reload_ui()
    client = TestClient(host.app)
    try:
        assert client.get("/sdapi/v1/samplers").status_code == 401
        assert client.get("/sdapi/v1/samplers", auth=("user", "wrong")).status_code == 401
        assert client.get("/sdapi/v1/samplers", auth=("user", "pass:word")).status_code == 200
        assert client.get("/sdapi/v1/samplers", auth=("second", "2")).status_code == 200
        assert client.get("/recorder").json() == {"demo": True}, "an extension's own route is not behind them"
    finally:
        shared.cmd_opts.api_auth = None
        host.reload_ui()


def test_page(host, client):
    ids = {c["props"].get("elem_id") for c in host.build_page().config["components"]}
    for tab in ("txt2img", "img2img"):
        names = (
            "prompt neg_prompt generate interrupt skip steps sampling width height cfg_scale seed batch_size gallery"
        )
        assert {f"{tab}_{name}" for name in names.split()} < ids
        assert {f"html_info_{tab}", f"html_log_{tab}", f"{tab}_tab", f"script_{tab}_recorder_level"} < ids
    assert {"txt2img_hr", "txt2img_hr-checkbox", "pnginfo_image", "settings_submit", "setting_recorder_flag"} < ids
    page = client.get("/").text
    head = page[: page.index("</head>")]
    assert "fonts.g" not in page
    assert "cdnjs" not in page
    for name in ("page.js", "page.css", "javascript/recorder.js", "style.css"):
        assert f"{name}?" in head
        address = next(part for part in head.split('"') if f"{name}?" in part)
        assert client.get(f"/{address}").status_code in (200, 403), "files are let out by `serve`"


def test_reload_ui(host, recorded):
    from modules import scripts, shared

    old = scripts.scripts_data[-1]
    old_app = host.app
    shared.opts.set("recorder_flag", True)
    recorded.clear()
    host.reload_ui()
    assert recorded.events[:3] == ["before_reload", "script_unloaded", "before_ui"]
    modules = [data.module for data in scripts.scripts_data if data.script_class.__name__ == "Recorder"]
    assert modules[0] is not old.module
    assert modules[0].recorded is recorded, "packages stay imported"
    assert next(e.path for e in host.modules.extensions.active()) == modules[0].BASEDIR
    assert scripts.basedir() != modules[0].BASEDIR
    assert shared.opts.recorder_flag is True
    assert host.app is not old_app


def test_reload_script_bodies(host, recorded, generate):
    host.reload_script_bodies()
    generate(steps=1)
    assert recorded.events.count("cfg_denoiser") == 2, "what was registered before is not cleared"
    host.reload_ui()
    recorded.clear()
    generate(steps=1)
    assert recorded.events.count("cfg_denoiser") == 1


@pytest.fixture
def ui_config(host: Host) -> Iterator[dict]:
    from modules import shared

    with open(shared.ui_config_filename, encoding="utf8") as file:
        saved = file.read()
    yield json.loads(saved)
    with open(shared.ui_config_filename, "w", encoding="utf8") as file:
        file.write(saved)
    host.reload_ui()


def test_ui_config_wins_over_code_but_not_for_the_api(host, recorded, ui_config, generate):
    from modules import scripts, shared

    key = "customscript/recorder.py/img2img/Recorder level/value"
    assert ui_config[key] == 0.5
    assert ui_config["txt2img/Hires. fix/value"] is False
    assert not [key for key in ui_config if "Recorder preset" in key]
    with open(shared.ui_config_filename, "w", encoding="utf8") as file:
        json.dump({**ui_config, key: 0.9}, file)
    host.reload_ui()
    assert host.app
    level = next(c for c in scripts.scripts_img2img.inputs if getattr(c, "label", "") == "Recorder level")
    assert level.value == 0.9
    seen = []
    recorded.actions["process"] = lambda p, *args: seen.append(args)
    generate("img2img", init_images=[Image.new("RGB", (16, 16))])
    assert seen == [("nothing", 0.5)]


def test_paste(host, recorded):
    """What "Send to" does, without the browser: the bound functions, called with an infotext."""
    from modules import scripts

    button = next(b for b in host.demo.blocks.values() if getattr(b, "elem_id", None) == "txt2img_tab")
    paste = [d for d in host.demo.dependencies if button._id in d["targets"] and len(d["outputs"]) > 5]
    function = host.demo.fns[host.demo.dependencies.index(paste[0])].fn
    infotext = (
        "a dog\nSteps: 7, Seed: 5, Size: 24x32, Recorder note: pasted, Recorder level: 0.8, Token merging ratio: 0.5"
    )
    updates = dict(zip(paste[0]["outputs"], function(infotext), strict=True))

    def value(label):
        found = [i for i in paste[0]["outputs"] if getattr(host.demo.blocks[i], "label", None) == label]
        return updates[found[0]].get("value")

    labels = ["Prompt", "Sampling steps", "Width", "Height", "Recorder note", "Recorder level", "Hires. fix"]
    assert [value(label) for label in labels] == ["a dog", 7.0, 24.0, 32.0, "pasted", 0.8, False]
    assert value("Override settings") == ["Token merging ratio: 0.5"]
    assert scripts.scripts_txt2img.paste_field_names == ["Recorder note", "Recorder level"]


def test_no_model_loaded_and_started_twice(tmp_path, host, recorded, make_model):
    """A second start sets everything back, in the same modules; `load_model=False` loads nothing until it is used."""
    from modules import scripts, shared

    from lab.host import start

    shared.opts.set("recorder_flag", True)
    second = start(make_model(), [], tmp_path, load_model=False)
    try:
        assert second.sd_model is None
        assert "recorder_flag" not in shared.opts.data
        assert [s.script_class.__name__ for s in scripts.scripts_data if s.path.endswith("recorder.py")] == []
        assert second.txt2img(prompt="cat", steps=1, width=8, height=8, sampler_name="Euler").images
        assert second.sd_model is not None
        assert sys.modules["modules.shared"] is shared
    finally:
        second.close()
    assert second.sd_model is None
