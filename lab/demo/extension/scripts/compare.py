"""The demo's own script in the miniature host: the same picture with and without merging, side by side."""

from __future__ import annotations

import html
import time
from copy import copy

import gradio as gr
from modules import processing, scripts, shared

from lab.demo.compare import AMPLIFIED, SCRIPT, difference, enlarged, sheet


class Compare(scripts.Script):
    """In the list of scripts of the txt2img tab; under the tab's prompt, what the model doesn't know of it."""

    def title(self) -> str:
        return SCRIPT

    def show(self, is_img2img: bool) -> bool:
        return not is_img2img

    def after_component(self, component: gr.blocks.Block, **kwargs) -> None:
        if kwargs.get("elem_id") == "txt2img_prompt":
            words = gr.HTML(lambda: _words(""), elem_id="demo_words", elem_classes=["demo-words"])
            component.change(_words, inputs=[component], outputs=[words], show_progress=False, queue=False)

    def run(self, p, *args):
        """Makes the page's picture without merging and then as the panel says; each with its time.

        In this order: what the panel tells of the last generation is of the merged one.
        """
        p.do_not_save_grid = True
        processing.fix_seed(p)
        shared.state.job_count = 2 * p.n_iter
        twin = copy(p)
        twin.extra_generation_params, twin.comments = dict(p.extra_generation_params), {}
        twin.script_args = list(p.script_args)
        twin.script_args[p.scripts.script("ToMe").args_from] = False
        plain, without_merging = _timed(twin)
        if shared.state.interrupted:
            return plain
        merged, with_merging = _timed(p)
        if "ToMe ratio" not in p.extra_generation_params or shared.state.interrupted:
            return merged
        return _compared(plain, merged, without_merging, with_merging)


def _words(prompt: str) -> str:
    """What the model doesn't know of a prompt, and, folded, what it does know."""
    model = shared.sd_model
    unknown = ", ".join(html.escape(word) for word in model.unknown_words(prompt))
    said = f"<p>The model does not know: <b>{unknown}</b>. It leaves that out.</p>" if unknown else ""
    known = html.escape(", ".join(model.captions or model.words))
    return f"{said}<details><summary>What the model knows</summary><p>{known}</p></details>"


def _timed(p) -> tuple[processing.Processed, float]:
    began = time.perf_counter()
    processed = processing.process_images(p)
    return processed, time.perf_counter() - began


def _compared(plain, merged, without_merging: float, with_merging: float):
    """`merged` with all there is to see in place of its pictures: a sheet for each, then each picture of the sheets."""
    count = len(plain.images)
    pictures, maps = merged.images[:count], merged.images[count:]
    times = f"without merging: {without_merging:.2f} s", f"with merging: {with_merging:.2f} s"
    sheets, singles, infotexts = [], [], []
    for number, (before, after) in enumerate(zip(plain.images, pictures, strict=True)):
        labels = [*times, f"difference, {AMPLIFIED} times", "merge map"]
        row = [enlarged(before), enlarged(after), enlarged(difference(before, after))]
        row += [enlarged(drawn, row[0].size) for drawn in maps[number : number + 1]]
        sheets.append(sheet(row, labels[: len(row)], columns=2))
        for picture, label in zip(row, labels, strict=False):
            picture.info["label"] = label
        singles += row
        texts = merged.infotexts[number]
        infotexts += [plain.infotexts[number], *[texts] * (len(row) - 1)]
    merged.images, merged.index_of_first_image = sheets + singles, len(sheets)
    merged.infotexts = merged.infotexts[:count] + infotexts
    merged.comments += "".join(f"{line}\n" for line in times)
    return merged
