"""WebUI's own token merging, where both are on."""

from __future__ import annotations

import pytest
from in_host import HALF, HALVED, HIRES, arguments, failing_unet, keys_of
from PIL import Image


@pytest.fixture
def blocks(host, on_denoised):
    """Classes of the transformer blocks, in each evaluation."""
    kinds = []
    on_denoised(
        lambda _: kinds.append(
            {type(m).__name__ for m in host.sd_model.modules() if hasattr(m, "attn1")}
        )
    )
    return kinds


@pytest.mark.parametrize(
    ("tab", "fields"),
    [
        ("txt2img", {}),
        ("txt2img", HIRES),
        ("img2img", {"init_images": [Image.new("RGB", (32, 32))]}),
    ],
    ids=["one pass", "hires", "img2img"],
)
def test_webuis_own_merging_is_off_where_the_extension_merges(
    make, own_merging, blocks, attention, add_script, sampling, tab, fields
):
    from modules import shared

    ratios = []
    add_script(
        process_batch=lambda p, **_: ratios.append(
            [p.get_token_merging_ratio(for_hr=hr) for hr in (False, True)]
        )
    )
    processed = make(HALVED, tab, **fields)
    assert ratios == [[0, 0]]
    assert set().union(*blocks) == {"BasicTransformerBlock"}
    assert attention.tokens[0] == HALF
    assert "Token merging ratio" not in processed.infotexts[0]
    for summary in (processed.comments, sampling.generation.last.summary):
        assert "own token merging" in summary and "nothing merged" not in summary
    assert shared.opts.data == own_merging


@pytest.mark.parametrize("tome", [None, [False], [True, "abc"], arguments(apply_to="hires pass")])
def test_webuis_own_merging_works_where_the_extension_merges_nothing(
    make, own_merging, blocks, tome
):
    make(HALVED)
    blocks.clear()
    processed = make(tome)
    assert blocks == [{"ToMeBlock"}] * 2
    assert "Token merging ratio: 0.4" in processed.infotexts[0]


def test_the_option_lets_webuis_own_merging_win(make, own_merging, blocks):
    from modules import shared

    shared.opts.data["tome_overrule_built_in"] = False
    processed = make(HALVED)
    assert blocks == [{"ToMeBlock"}] * 2
    assert keys_of(processed) == {}
    assert "nothing merged" in processed.comments and "own token merging" in processed.comments


def test_webuis_own_merging_is_restored_after_a_failure(host, make, own_merging, blocks):
    from modules import shared

    with failing_unet(host), pytest.raises(ValueError, match="on purpose"):
        make(HALVED)
    assert shared.opts.data == own_merging
    blocks.clear()
    assert "Token merging ratio: 0.4" in make().infotexts[0]
    assert blocks == [{"ToMeBlock"}] * 2
