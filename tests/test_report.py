import tomesd_core as tome
from tomesd_core.report import LayerReport, Report


def test_the_summary_names_layers_tokens_and_steps():
    layers = [
        LayerReport("a", 1, 4096, 2048, 20, 15),
        LayerReport("b", 1, 4096, 2048, 20, 15),
        LayerReport("c", 2, 1024, 512, 20, 15),
        LayerReport("d", 4, 256, 0, 20, 0, "level 4 is above max downsample 2"),
    ]
    report = Report(layers, 20, 15, 0.5, ["no attention at level 8"])
    assert report.merged_layers == layers[:3]
    merged = "3 of 4 self-attention layers", "4096 → 2048 tokens", "1024 → 512 tokens"
    for part in (*merged, "15 of 20 steps", "no attention at level 8"):
        assert part in report.summary
    assert "\n" not in report.summary


def test_a_report_without_merging_has_the_reasons_and_the_notes():
    reasons = "level 2 is above max downsample 1", "64 tokens are under min tokens 100"
    layers = [LayerReport("a", 1, calls=1, reason=reason) for reason in reasons]
    summary = Report(layers, 1, 0, 0.5, ["no attention at level 1"]).summary
    for part in ("nothing merged", *reasons, "no attention at level 1"):
        assert part in summary
    assert "this model has no layers" in Report([], 1, 0, 0.5, ["this model has no layers"]).summary


def test_conflicts_are_in_the_summary_next_to_merged_layers():
    layers = [
        LayerReport("a", 2, 512, 256, 2, 2),
        LayerReport("b", 1, calls=2, reason="tiled", conflict="tiled"),
        LayerReport("c", 1, calls=2, reason="tiled", conflict="tiled"),
        LayerReport("d", 4, calls=2, reason="level 4 is above max downsample 2"),
    ]
    summary = Report(layers, 2, 2, 0.5, []).summary
    for part in ("1 of 4", "512 → 256 tokens", "2 of 2 steps"):
        assert part in summary
    assert summary.count("tiled") == 1 and "2 " in summary.rpartition(";")[2]


def test_a_failure_is_the_reason_before_all_others():
    layers = [
        LayerReport("a", 1, calls=1, reason="merging failed: x"),
        LayerReport("b", 2, calls=1, reason="level 2 is above 1"),
    ]
    summary = Report(layers, 1, 0, 0.5, ["no attention at level 1"], "merging failed: x").summary
    assert "nothing merged" in summary and summary.endswith("merging failed: x")
    assert "level" not in summary
    merged = LayerReport("a", 1, 64, 32, 2, 1)
    merged.count_unmerged("merging failed: x")
    summary = Report([merged], 2, 1, 0.5, [], "merging failed: x").summary
    assert summary.count("merging failed: x") == 1


def test_the_whole_report_names_every_layer_and_its_reason():
    why = "level 8 is above max downsample 1"
    layers = [
        LayerReport("input_blocks.1.1", 1, 4096, 2048, 20, 15),
        LayerReport("middle_block.1", 8, 64, 0, 20, 0, why),
    ]
    text = str(Report(layers, 20, 15, 0.5, []))
    first, second = (line for line in text.splitlines() if line.startswith(" "))
    assert all(part in first for part in ("input_blocks.1.1 (level 1)", "4096 → 2048", "15 of 20"))
    assert all(part in second for part in ("middle_block.1 (level 8)", "not merged", why))


def test_a_report_can_be_read_before_during_and_after(make_unet, make_inputs, small_settings):
    unet = make_unet()
    merging = tome.attach(unet, small_settings(window=None))
    before = merging.report()
    assert (before.steps, before.merged_steps, before.ratio) == (0, 0, None)
    assert "nothing merged" in str(before)
    during = []
    handle = unet.middle_block.register_forward_hook(lambda *_: during.append(merging.report()))
    unet(*make_inputs())
    handle.remove()
    assert [len(report.merged_layers) for report in during] == [1]
    assert len(merging.report().merged_layers) == 3
    merging.detach()
    after = merging.report()
    assert len(after.merged_layers) == 3
    assert (after.steps, after.merged_steps, after.ratio) == (1, 1, 0.5)
    assert len(before.merged_layers) == 0, "a report read earlier does not change"
