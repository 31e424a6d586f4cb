/* What an extension's JavaScript finds on WebUI's page, under the same names, and what the miniature page itself needs. */
"use strict";

function gradioApp() {
    const app = document.getElementsByTagName("gradio-app")[0] || document;
    if (app !== document && !app.getElementById) app.getElementById = id => document.getElementById(id);
    return app.shadowRoot || app;
}

function get_uiCurrentTab() {
    return gradioApp().querySelector("#tabs > .tab-nav > button.selected");
}

function get_uiCurrentTabContent() {
    return gradioApp().querySelector('#tabs > .tabitem[id^=tab_]:not([style*="display: none"])');
}

const uiCallbacks = {update: [], afterUpdate: [], loaded: [], tabChange: []};
function onUiUpdate(callback) { uiCallbacks.update.push(callback); }
function onAfterUiUpdate(callback) { uiCallbacks.afterUpdate.push(callback); }
function onUiLoaded(callback) { uiCallbacks.loaded.push(callback); }
function onUiTabChange(callback) { uiCallbacks.tabChange.push(callback); }

function executeCallbacks(queue, arg) {
    for (const callback of queue) {
        try {
            callback(arg);
        } catch (e) {
            console.error("error running callback", callback, ":", e);
        }
    }
}

document.addEventListener("DOMContentLoaded", () => {
    let loaded = false, timer = null, tab = null;
    new MutationObserver(mutations => {
        if (!loaded && gradioApp().querySelector("#txt2img_prompt")) {
            loaded = true;
            executeCallbacks(uiCallbacks.loaded);
        }
        executeCallbacks(uiCallbacks.update, mutations);
        clearTimeout(timer);
        timer = setTimeout(() => executeCallbacks(uiCallbacks.afterUpdate), 200);
        const current = get_uiCurrentTab();
        if (current && current !== tab) {
            tab = current;
            executeCallbacks(uiCallbacks.tabChange);
        }
    }).observe(gradioApp(), {childList: true, subtree: true});
});

function updateInput(target) {
    target.dispatchEvent(new Event("input", {bubbles: true}));
}

function set_theme(theme) {
    const url = new URL(location.href);
    if (!url.searchParams.has("__theme")) {
        url.searchParams.set("__theme", theme);
        location.replace(url);
    }
}

/* InputAccordion: a checkbox in the fold's title. Opening the fold checks it, until it is clicked itself. */

function inputAccordionChecked(id, checked) {
    const accordion = gradioApp().getElementById(id);
    if (!accordion || !accordion.visibleCheckbox) return;
    accordion.visibleCheckbox.checked = checked;
    accordion.onVisibleCheckboxChange();
}

onUiLoaded(() => {
    for (const accordion of gradioApp().querySelectorAll(".input-accordion")) {
        const title = accordion.querySelector(".label-wrap");
        const hidden = gradioApp().querySelector(`#${accordion.id}-checkbox input`);
        const extra = gradioApp().querySelector(`#${accordion.id}-extra`);
        const isOpen = () => title.classList.contains("open");
        let linked = true;
        if (extra) title.insertBefore(extra, title.lastElementChild);

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
            updateInput(hidden);
        };
        box.addEventListener("click", event => {
            linked = false;
            event.stopPropagation();
        });
        box.addEventListener("input", accordion.onVisibleCheckboxChange);
        new MutationObserver(() => {
            accordion.classList.toggle("input-accordion-open", isOpen());
            if (linked && box.checked !== isOpen()) {
                box.checked = isOpen();
                accordion.onVisibleCheckboxChange();
            }
        }).observe(title, {attributes: true, attributeFilter: ["class"]});
    }
});

/* Help on hover. */

onUiLoaded(() => {
    for (const {props} of window.gradio_config.components) {
        const element = props.webui_tooltip && props.elem_id && gradioApp().getElementById(props.elem_id);
        if (element) element.title = props.webui_tooltip;
    }
});

/* Generating: the buttons, the progress bar, and which picture of the gallery is shown. */

function showSubmitButtons(tab, idle) {
    for (const name of ["interrupt", "skip"]) {
        gradioApp().getElementById(`${tab}_${name}`).style.display = idle ? "none" : "block";
    }
    return [];
}

function requestProgress(task, tab) {
    const gallery = gradioApp().getElementById(`${tab}_gallery_container`);
    const frame = document.createElement("div");
    frame.className = "progressDiv";
    frame.innerHTML = '<div class="progress"></div>';
    gallery.before(frame);
    const started = Date.now();
    const poll = async () => {
        let answer = {completed: true};
        try {
            const body = JSON.stringify({id_task: task});
            const headers = {"Content-Type": "application/json"};
            answer = await (await fetch("./internal/progress", {method: "POST", headers, body})).json();
        } catch (e) { /* the server is gone: so is the bar */ }
        if (answer.completed || (!answer.active && Date.now() - started > 40000)) {
            frame.remove();
            showSubmitButtons(tab, true);
            return;
        }
        const percent = `${Math.round((answer.progress || 0) * 100)}%`;
        frame.firstChild.style.width = percent;
        frame.firstChild.textContent = answer.eta ? `${percent} ETA: ${Math.ceil(answer.eta)}s` : answer.textinfo || percent;
        setTimeout(poll, 300);
    };
    poll();
}

function submitTab(tab, args) {
    const task = `task(${Math.random().toString(36).slice(2)})`;
    showSubmitButtons(tab, false);
    requestProgress(task, tab);
    // gradio appends the outputs' present values: don't send the old pictures back
    return Array.from(args, (arg, i) => i === 0 ? task : i === args.length - 4 ? null : arg);
}

function submit() { return submitTab("txt2img", arguments); }
function submit_img2img() { return submitTab("img2img", arguments); }

function all_gallery_buttons() {
    const thumbnails = gradioApp().querySelectorAll("div[id$=_gallery] .thumbnails > .thumbnail-item.thumbnail-small");
    return Array.from(thumbnails).filter(thumbnail => thumbnail.parentElement.offsetParent);
}

function selected_gallery_index() {
    return all_gallery_buttons().findIndex(thumbnail => thumbnail.classList.contains("selected"));
}

function extract_image_from_gallery(gallery) {
    if (!gallery || gallery.length === 0) return [null];
    const index = selected_gallery_index();
    return [[gallery[index >= 0 && index < gallery.length ? index : 0]]];
}

onUiLoaded(() => {
    for (const tab of ["txt2img", "img2img"]) {
        gradioApp().getElementById(`${tab}_gallery`).addEventListener("click", () => {
            setTimeout(() => gradioApp().getElementById(`${tab}_generation_info_button`).click());
        });
    }
});

function switchToTab(number, args) {
    gradioApp().querySelectorAll("#tabs > .tab-nav > button")[number].click();
    return Array.from(args);
}

function switch_to_txt2img() { return switchToTab(0, arguments); }
function switch_to_img2img() { return switchToTab(1, arguments); }

function restart_reload() {
    document.body.innerHTML = '<h1 style="font-family: system-ui; margin: 20% auto">Reloading…</h1>';
    const again = () => setTimeout(ping, 500);
    const ping = () => fetch("./internal/ping").then(answer => answer.ok ? location.reload() : again(), again);
    setTimeout(ping, 2000);
    return [];
}
