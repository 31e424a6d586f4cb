/* Parts of WebUI's page that the extension's script and its accordion need. */
"use strict";

const gradioApp = () => document;
const loadedCallbacks = [];
function onUiLoaded(callback) { loadedCallbacks.push(callback); }

document.addEventListener("DOMContentLoaded", () => {
    const waiting = new MutationObserver(() => {
        if (!document.querySelector("#txt2img_prompt")) return;
        waiting.disconnect();
        loadedCallbacks.forEach(callback => callback());
    });
    waiting.observe(document, {childList: true, subtree: true});
});

function setTheme(theme) {
    const url = new URL(location.href);
    if (!url.searchParams.has("__theme")) {
        url.searchParams.set("__theme", theme);
        location.replace(url);
    }
}

/* InputAccordion: a checkbox in the title. Opening the accordion checks it, until it is clicked itself. */

function inputAccordionChecked(id, checked) {
    const accordion = document.getElementById(id);
    if (!accordion?.visibleCheckbox) return;
    accordion.visibleCheckbox.checked = checked;
    accordion.onVisibleCheckboxChange();
}

onUiLoaded(() => {
    for (const accordion of document.querySelectorAll(".input-accordion")) {
        const title = accordion.querySelector(".label-wrap");
        const hidden = document.querySelector(`#${accordion.id}-checkbox input`);
        const isOpen = () => title.classList.contains("open");
        let linked = true;

        const box = document.createElement("input");
        box.type = "checkbox";
        box.id = `${accordion.id}-visible-checkbox`;
        box.className = `${hidden.className} input-accordion-checkbox`;
        box.checked = isOpen();
        title.querySelector("span").prepend(box);

        accordion.visibleCheckbox = box;
        accordion.onVisibleCheckboxChange = () => {
            if (linked && isOpen() !== box.checked) title.click();
            hidden.checked = box.checked;
            hidden.dispatchEvent(new Event("input", {bubbles: true}));
        };
        box.addEventListener("click", event => {
            linked = false;
            event.stopPropagation();
        });
        box.addEventListener("input", accordion.onVisibleCheckboxChange);
        new MutationObserver(() => {
            if (linked && box.checked !== isOpen()) {
                box.checked = isOpen();
                accordion.onVisibleCheckboxChange();
            }
        }).observe(title, {attributes: true, attributeFilter: ["class"]});
    }
    // Help on hover.
    for (const {props} of window.gradio_config.components) {
        const element = props.webui_tooltip && props.elem_id && document.getElementById(props.elem_id);
        if (element) element.title = props.webui_tooltip;
    }
});
