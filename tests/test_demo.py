"""The demo's command and the layout of its pictures."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from lab.demo import model
from lab.demo.__main__ import main
from lab.demo.compare import AMPLIFIED, LINE, MARGIN, difference, enlarged

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures_of(path):
    """Cut a saved sheet into its pictures of 256×256 pixels."""
    whole, top = Image.open(path), MARGIN + LINE
    assert whole.height == top + 256 + MARGIN
    lefts = range(MARGIN, whole.width, 256 + MARGIN)
    assert lefts.stop == lefts[-1] + 256 + MARGIN
    return [whole.crop((left, top, left + 256, top + 256)) for left in lefts]


def test_a_prompt_makes_the_pictures_saves_them_and_ends(tmp_path, capsys):
    out = tmp_path / "new" / "cat.png"
    assert main(["cat qwxyz", "--ratio", "0.8", "--steps", "8", "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "does not know the word 'qwxyz'" in output and "'cat'" not in output
    assert "1024 → 384 keys, 8 of 8 steps" in output
    assert "merge map of step 4, layer 1" in output
    assert len(re.findall(r"^with(out)? merging: \d+\.\d\d s$", output, re.MULTILINE)) == 2
    assert output.endswith(f"saved: {out.resolve()}\n")
    without, with_merging, apart, merge_map = pictures_of(out)
    assert without.tobytes() != with_merging.tobytes()
    assert apart.tobytes() == difference(without, with_merging).tobytes()
    small = without.resize((32, 32), Image.NEAREST)
    assert enlarged(small).tobytes() == without.tobytes(), "each pixel is a square"
    is_plain = [a == b for a, b in zip(with_merging.getdata(), merge_map.getdata(), strict=True)]
    assert 0.05 < sum(is_plain) / len(is_plain) < 0.95, "some tokens merged and some didn't"


def test_the_same_command_makes_the_same_pictures(tmp_path, capsys):
    pictures = []
    for seed in (4, 4, 5):
        main(["cat", "--steps", "1", "--seed", str(seed), "--out", str(tmp_path / "out.png")])
        pictures.append([picture.tobytes() for picture in pictures_of(tmp_path / "out.png")])
    assert pictures[0] == pictures[1]
    assert pictures[0][0] != pictures[2][0]


def test_another_model_makes_other_pictures(tmp_path, capsys):
    pictures = {}
    for name, unknown in (("emoji", "fur"), ("photos", "apple")):
        out = tmp_path / f"{name}.png"
        assert main(["cat fur apple", "--model", name, "--steps", "2", "--out", str(out)]) == 0
        assert re.findall(r"does not know the word '(\w+)'", capsys.readouterr().out) == [unknown]
        pictures[name] = pictures_of(out)[0]
    assert pictures["emoji"].tobytes() != pictures["photos"].tobytes()


def test_where_nothing_merges_the_pictures_are_equal_and_there_is_no_map(tmp_path, capsys):
    assert main(["cat", "--ratio", "0", "--steps", "2", "--out", str(tmp_path / "out.png")]) == 0
    without, with_merging, apart = pictures_of(tmp_path / "out.png")
    assert without.tobytes() == with_merging.tobytes()
    assert apart.getbbox() is None
    assert "nothing merged: " in capsys.readouterr().out


def test_a_wrong_ratio_is_named_and_nothing_is_saved(tmp_path, capsys):
    assert main(["cat", "--ratio", "0.95", "--steps", "1", "--out", str(tmp_path / "out.png")]) == 2
    printed = capsys.readouterr().out
    assert "ratio" in printed and "[0, 0.9375]" in printed
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("size", ["33x32", "32", "8x32", "32x104", "x", "-32x32"])
def test_an_impossible_size_is_refused(capsys, size):
    with pytest.raises(SystemExit) as exit_:
        main(["cat", f"--size={size}"])
    assert exit_.value.code == 2
    assert "multiples of 8" in capsys.readouterr().err


def test_without_weights_a_random_model_is_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model, "WEIGHTS", tmp_path)
    assert main(["cat", "--steps", "1", "--out", str(tmp_path / "out.png")]) == 0
    assert "tiny.safetensors is missing" in capsys.readouterr().out


def test_without_a_prompt_a_page_is_served_until_ctrl_c():
    command = [sys.executable, "-m", "lab.demo"]
    address_line = re.compile(r"The page: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n")
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            address = next(filter(None, map(address_line.fullmatch, process.stdout)), None)
            assert address, "it ended without saying its address"
            with urllib.request.urlopen(address[1], timeout=60) as reply:
                assert "gradio" in reply.read().decode()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (rest, process.returncode) == ("Stopping.\n", 0)


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=port):
            main(["--port", port])


def test_the_difference_is_amplified_and_clipped():
    one, other = Image.new("RGB", (2, 1), (100, 100, 100)), Image.new("RGB", (2, 1), (100, 107, 0))
    expected = (0, 7 * AMPLIFIED, 255)
    for pair in ((one, other), (other, one)):
        assert list(difference(*pair).getdata()) == [expected] * 2
