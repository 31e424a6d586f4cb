// Updates the panel's preview and title after a change, but not while a slider is moving.
// gradio calls these functions, each documented below.
var toMeFollow, toMeChanged, toMeAsking, toMeAnswered;
var toMeMeasure, toMeMeasuring, toMeMeasuredTask, toMeMeasured;

(function() {
    "use strict";

    const QUIET_MS = 250;
    // gradio's update of nothing. It writes a returned value a moment later, when the user may have
    // entered another one.
    const UNCHANGED = {__type__: "update"};
    const previews = {txt2img: {values: {}}, img2img: {values: {}}};
    const tasks = {};
    const byId = id => gradioApp().querySelector("#" + id);
    const presetField = tab => byId(`script_${tab}_tome_preset input`);
    const isText = node => node.nodeType === Node.TEXT_NODE && node.data.trim();
    const lastText = element => [...element.childNodes].filter(isText).pop();
    const onChange = (element, listen) =>
        new MutationObserver(listen).observe(element, {childList: true, subtree: true});

    // One of the tab's own components changed: keep its value for the next request.
    toMeFollow = (tab, name, value) => {
        previews[tab].values[name] = value;
        previews[tab].refresh?.();
    };
    // A preview is asked for: add the tab's values, and leave out the last preview.
    toMeAsking = (tab, given) => [JSON.stringify(previews[tab].values), ...given.slice(1, -1)];
    // The page was loaded, or a control of the panel changed. Before the page is loaded gradio has
    // not connected its buttons.
    toMeChanged = tab => {
        previews[tab].connected = true;
        previews[tab].entered = null;
        previews[tab].refresh?.();
    };
    // The preview arrived. Returns the preset to show: the one that matches the panel, unless the
    // user has entered another name.
    toMeAnswered = tab => {
        const own = previews[tab];
        const field = presetField(tab);
        const data = byId(`script_${tab}_tome_preview`)?.querySelector("[data-presets]")?.dataset;
        own.answered?.();
        if (!data || field === document.activeElement) return UNCHANGED;
        const name = field.value;
        // The user has entered it since the request, unless it is our own last name, written late.
        if (![own.nameBefore, own.written].includes(name)) own.entered = name;
        // A new name, or one entered since the last change of a control, stays for 💾 and 🗑️.
        const isNew = !JSON.parse(data.presets).includes(name);
        if (name && (isNew || name === own.entered)) return UNCHANGED;
        own.written = data.preset;
        return name === data.preset ? UNCHANGED : data.preset || null;
    };

    // Start a measurement, or end the running one.
    toMeMeasure = tab => {
        byId(`script_${tab}_tome_measure_${tasks[tab] ? "stop" : "start"}`).click();
    };
    // A measurement starts: add its task and the final size of hires fix to the request.
    toMeMeasuring = function(tab, given) {
        const task = `task(tome-${Math.random().toString(36).slice(2)})`;
        const asked = {...previews[tab].values, task};
        // The host shows the final size of hires fix.
        const hires = byId("txt2img_hr-checkbox")?.querySelector("input");
        const isHires = tab === "txt2img" && hires?.checked;
        const texts = byId("txtimg_hr_finalres")?.querySelectorAll(".resolution") ?? [];
        const size = isHires && [...texts].pop();
        const sides = /(\d+)x(\d+)/.exec(size?.textContent ?? "");
        if (sides) [asked.hires_width, asked.hires_height] = sides.slice(1).map(Number);
        tasks[tab] = asked.task;
        nameMeasure(tab, "Interrupt");
        const lines = byId(`script_${tab}_tome_measure_lines`);
        if (typeof requestProgress === "function") {
            requestProgress(asked.task, lines, null, () => {});
        }
        return [JSON.stringify(asked), ...given.slice(1)];
    };
    toMeMeasuredTask = tab => tasks[tab];
    toMeMeasured = tab => {
        tasks[tab] = null;
        nameMeasure(tab, "Measure");
    };

    function nameMeasure(tab, name) {
        const button = byId(`script_${tab}_tome_measure`);
        lastText(button)?.replaceWith(name);  // WebUI translates new nodes only.
    }

    // WebUI translates whole texts only. Our lines contain numbers: each part of a line is looked up
    // with {0}, {1} and so on in their place.
    function translated(line) {
        const words = window.localization ?? {};
        return words[line] ?? line.split(/(, |; |: )/).map(part => {
            const numbers = [];
            const key = part.replace(/\d+(\.\d+)?/g, number => `{${numbers.push(number) - 1}}`);
            return (words[key] ?? key).replace(/{(\d+)}/g, (_, place) => numbers[place]);
        }).join("");
    }

    function translate(element, isOurs = () => true) {
        const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
        for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const text = node.data.trim();
            if (text && isOurs(text) && translated(text) !== text) node.data = translated(text);
        }
    }

    // Lowering the ratio lowers the late ratio too, so that late steps never merge more.
    function keepLateRatioLow(ratio, late) {
        ratio?.addEventListener("change", event => {
            const input = late?.querySelector("input[type=number]");
            if (!input || Number(input.value) <= Number(event.target.value)) return;
            input.value = event.target.value;
            input.dispatchEvent(new Event("input"));
        });
    }

    // Make the title reachable by keyboard, which gradio's is not.
    function makeReachable(title) {
        const tell = () => title.setAttribute("aria-expanded", title.classList.contains("open"));
        title.tabIndex = 0;
        title.setAttribute("role", "button");
        title.addEventListener("keydown", event => {
            // The switch in the title handles its own keys.
            if (event.target !== title || !["Enter", " "].includes(event.key)) return;
            event.preventDefault();
            title.click();
        });
        new MutationObserver(tell).observe(title, {attributes: true, attributeFilter: ["class"]});
        tell();
    }

    function follow(tab) {
        const prefix = `script_${tab}_tome_`;
        const panel = byId(prefix + "enabled");
        const preview = byId(prefix + "preview");
        if (!panel || !preview) return;
        makeReachable(panel.querySelector(".label-wrap"));
        let timer = null;
        let held = false;
        let waiting = false;
        let asking = false;

        const refresh = () => {
            waiting = true;
            clearTimeout(timer);
            timer = setTimeout(() => {
                // Wait until a held slider is released, and until the last preview arrived: gradio
                // drops a second request.
                if (held || asking || !previews[tab].connected) return;
                waiting = false;
                asking = true;
                previews[tab].nameBefore = presetField(tab)?.value;
                byId(prefix + "refresh")?.click();  // Reload UI empties the page.
            }, QUIET_MS);
        };
        const answered = () => {
            asking = false;
            if (waiting) refresh();
        };
        Object.assign(previews[tab], {refresh, answered});
        window.addEventListener("pointerdown", () => held = true, true);
        for (const end of ["pointerup", "pointercancel"]) {
            window.addEventListener(end, () => {
                held = false;
                if (waiting) refresh();
            }, true);
        }

        // A generation finished.
        for (const results of ["html_info", "html_log"].map(name => byId(`${name}_${tab}`))) {
            const finished = () => {
                translate(results, text => text.startsWith("ToMe: "));
                refresh();
            };
            if (results) onChange(results, finished);
        }
        for (const name of ["preview", "preset_message", "measure_lines"]) {
            const lines = byId(prefix + name);
            if (lines) onChange(lines, () => translate(lines));
        }
        byId(prefix + "preset")?.addEventListener("input", event => {
            previews[tab].entered = event.target.value;
        });
        keepLateRatioLow(byId(prefix + "ratio"), byId(prefix + "late_ratio"));
        const entitle = () => {
            const title = translated(preview.querySelector("[data-title]")?.dataset.title ?? "");
            const label = panel.querySelector(".label-wrap > span");
            if (!title || !label) return;
            const text = lastText(label);
            if (text && text.textContent !== title) text.textContent = title;
        };
        onChange(preview, entitle);
        refresh();
    }

    onUiLoaded(() => ["txt2img", "img2img"].forEach(follow));
})();
