"""Scripts of other extensions that fail, or wrap `p.sample`."""

from __future__ import annotations

import pytest
from in_host import FULL, HALF, HALVED, HIRES, fail, pixels, wrapper


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "name", ["before_process", "process", "process_batch", "before_hr", "postprocess"]
)
def test_an_exception_in_another_script_changes_nothing(make, add_script, merged, first, name):
    hires = HIRES if name == "before_hr" else {}
    expected = pixels(make(HALVED, **hires)) if hires else merged
    add_script(first, **{name: fail})
    assert pixels(make(HALVED, **hires)) == expected


def staying(log):
    """A callback that wraps `p.sample` for good."""

    def wrap(p, *_):
        before = p.sample
        p.sample = lambda *args, **kwargs: log.append("samples") or before(*args, **kwargs)

    return wrap


@pytest.mark.parametrize(
    ("callback", "wrap", "lines"),
    [
        ("before_process_batch", wrapper, ["begins", "ends"]),
        ("before_process", staying, ["samples"]),
    ],
    ids=["for each batch", "for good"],
)
def test_a_script_may_wrap_sample_first(make, add_script, merged, callback, wrap, lines):
    log, left = [], []
    add_script(
        **{callback: wrap(log)}, postprocess=lambda p, *_: left.append(vars(p).pop("sample", None))
    )
    assert make(HALVED, n_iter=2).images[1].tobytes() == merged[0]
    assert log == lines * 2
    assert getattr(left[0], "__name__", None) == ("<lambda>" if wrap is staying else None)


def test_a_script_may_wrap_sample_last(host, make_p, add_script, attention, process):
    """It restores the extension's spent wrapper, which does nothing and does not accumulate."""
    log = []
    add_script(process_batch=wrapper(log))
    p = make_p(HALVED, n_iter=3, steps=1)
    processed = process(p)
    assert attention.tokens == [HALF] * 3
    assert log == ["begins", "ends"] * 3
    assert processed.comments.count("ToMe") == 1
    assert not hasattr(getattr(p.sample, "__wrapped__", None), "__wrapped__")
    p.script_args = host.script_args([False])
    process(p)
    assert attention.tokens[3:] == [FULL] * 3
    vars(p).pop("sample", None)


def test_sampling_twice_in_one_batch_merges_once(make, add_script, attention):

    def wrap(p, *_, **__):
        before = p.sample

        def sample(*args, **kwargs):
            before(*args, **kwargs)
            del p.sample
            return before(*args, **kwargs)

        p.sample = sample

    add_script(process_batch=wrap)
    make(HALVED)
    assert attention.tokens == [HALF] * 2 + [FULL] * 2


def test_a_batch_that_fails_before_sampling_leaves_no_wrapped_sample(
    host, make_p, attention, process
):
    """Loops reuse `p`: its next run, with merging off, doesn't merge."""
    p = make_p(HALVED)
    p.setup_conds = fail
    with pytest.raises(ValueError, match="on purpose"):
        process(p)
    del p.setup_conds
    p.script_args = host.script_args([False])
    process(p)
    assert attention.tokens == [FULL] * 2
