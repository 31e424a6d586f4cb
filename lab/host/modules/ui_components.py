"""Stands in for `modules.ui_components`: WebUI's own components."""

from __future__ import annotations

import gradio as gr


class FormComponent:
    """Goes into gradio's rounded forms."""

    def get_expected_parent(self):
        """The form."""
        return gr.components.Form


gr.Dropdown.get_expected_parent = FormComponent.get_expected_parent


class ToolButton(FormComponent, gr.Button):
    """A small button, one symbol wide."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, elem_classes=["tool", *kwargs.pop("elem_classes", [])], **kwargs)

    def get_block_name(self):
        """Gradio's name for it."""
        return "button"


class ResizeHandleRow(gr.Row):
    """A row whose columns the reader may drag; here a plain row."""

    def get_block_name(self):
        """Gradio's name for it."""
        return "row"


class FormRow(FormComponent, gr.Row):
    """A row inside a form."""

    def get_block_name(self):
        """Gradio's name for it."""
        return "row"


class FormColumn(FormComponent, gr.Column):
    """A column inside a form."""

    def get_block_name(self):
        """Gradio's name for it."""
        return "column"


class FormGroup(FormComponent, gr.Group):
    """A group inside a form."""

    def get_block_name(self):
        """Gradio's name for it."""
        return "group"


class FormHTML(FormComponent, gr.HTML):
    """HTML inside a form."""

    def get_block_name(self):
        """Gradio's name for it."""
        return "html"


class InputAccordion(gr.Checkbox):
    """A fold that is a toggle: a hidden checkbox, whose value it is, and an accordion that follows it."""

    global_index = 0

    def __init__(self, value, **kwargs):
        self.accordion_id = kwargs.pop("elem_id", None)
        if self.accordion_id is None:
            self.accordion_id = f"input-accordion-{InputAccordion.global_index}"
            InputAccordion.global_index += 1
        super().__init__(value, **{**kwargs, "elem_id": f"{self.accordion_id}-checkbox", "visible": False})
        self.change(None, _js=f"(checked) => inputAccordionChecked('{self.accordion_id}', checked)", inputs=[self])
        settings = {"label": "Accordion", **kwargs, "elem_classes": ["input-accordion"], "open": value}
        self.accordion = gr.Accordion(elem_id=self.accordion_id, **settings)

    def extra(self):
        """A place in the accordion's title line."""
        return gr.Column(elem_id=f"{self.accordion_id}-extra", elem_classes="input-accordion-extra", min_width=0)

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, exc_type, exc_val, exc_tb):
        self.accordion.__exit__(exc_type, exc_val, exc_tb)

    def get_block_name(self):
        """Gradio's name for it."""
        return "checkbox"
