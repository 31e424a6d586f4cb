"""The UNet of a checkpoint in the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from on_bench import CPU, rows_of
from safetensors.torch import save_file

from lab.bench import models
from lab.bench.__main__ import main
from lab.bench.contenders import UNMERGED
from lab.bench.models import PREFIX


def test_a_checkpoint_is_read_and_timed(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.BY_CONTEXT, 768, models.TINY)
    tiny = models.build_unet(models.TINY, CPU, torch.float32)
    weights = {PREFIX + name: tensor for name, tensor in tiny.state_dict().items()}
    other = {"first_stage_model.encoder.conv_in.bias": torch.zeros(2)}
    path = tmp_path / "sd1.safetensors"
    save_file({**weights, **other}, path)

    config, weights_of_file = models.read_checkpoint(path)
    assert config == models.TINY
    loaded = models.build_unet(config, CPU, torch.float32, weights_of_file)
    step, other = (models.one_step(unet, config, (64, 64)) for unet in (loaded, tiny))
    assert torch.equal(step(), other())

    def speed(file: Path, *more: str) -> int:
        return main(["speed", "--checkpoint", str(file), "--out", str(tmp_path), *more])

    assert speed(path, "--sizes", "64x64", "--ratios", "0.5", "--rounds", "1") == 0
    (csv_file,) = tmp_path.glob("speed-*.csv")
    assert UNMERGED in [row["contender"] for row in rows_of(csv_file)]

    # A missing tensor is an error, not a random weight.
    weights.popitem()
    save_file(weights, path)
    with pytest.raises(ValueError, match="Missing key"):
        models.build_unet(config, CPU, torch.float32, models.read_checkpoint(path)[1])
    assert speed(tmp_path / "none.ckpt") == 2
    assert "must be a .safetensors file" in capfd.readouterr().err
    sdxl = {"input_blocks.0.0.weight": 4, "x.attn2.to_k.weight": 2048}
    for shapes in ({"lora.up.weight": 2}, sdxl):
        save_file({PREFIX + name: torch.zeros(1, size) for name, size in shapes.items()}, path)
        assert speed(path) == 2
        assert "sd1.safetensors: there is no UNet" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("context", "inputs", "heads"),
    [(768, 4, {"num_heads": 8}), (1024, 9, {"num_head_channels": 64})],
)
def test_a_checkpoints_shape_is_that_of_its_version(
    tmp_path: Path, context: int, inputs: int, heads: dict[str, int]
) -> None:
    shapes = {"input_blocks.0.0.weight": inputs, "x.attn2.to_k.weight": context}
    path = tmp_path / "model.safetensors"
    save_file({PREFIX + name: torch.zeros(1, size) for name, size in shapes.items()}, path)
    config, _ = models.read_checkpoint(path)
    assert {"context_dim": context, "in_channels": inputs, **heads}.items() <= config.items()
