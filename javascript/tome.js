// Keeps the panel's preview and title in step with what is set, without a server call while a slider is moving.
// Called by gradio: for the tab's size, when a control has another value or the page is there, after an answer.
var toMeTabSize, toMeChanged, toMeAnswered, toMeMeasure, toMeMeasuring, toMeMeasuredTask, toMeMeasured;

(function() {
    "use strict";

    const QUIET_MS = 250;
    const previews = {txt2img: {}, img2img: {}};
    const tasks = {};
    const byId = id => gradioApp().querySelector("#" + id);
    const read = (tab, name) => {
        const input = byId(`${tab}_${name}`)?.querySelector("input[type=number]");
        return input ? Number(input.value) : null;
    };

    // The tab's width, height and steps, in place of the first three values given. What gradio gives goes on: after
    // the inputs come the outputs.
    toMeTabSize = (tab, given) =>
        ["width", "height", "steps"].map((name, i) => read(tab, name) ?? given[i]).concat(given.slice(3));

    // Before the first of these gradio has not connected the page's buttons.
    toMeChanged = tab => {
        previews[tab].connected = true;
        previews[tab].typed = null;
        previews[tab].refresh?.();
    };
    // Gives the preset that the field is to show: the one whose values stand in the panel, or what a person types.
    toMeAnswered = (tab, shown) => {
        previews[tab].answered?.();
        const field = byId(`script_${tab}_tome_preset`);
        const data = byId(`script_${tab}_tome_preview`).querySelector("[data-presets]")?.dataset;
        if (!data || field.contains(document.activeElement)) return shown;
        // A name of one's own, or one typed since a control last changed: 🗑️ is for it.
        const isTyped = shown && (!JSON.parse(data.presets).includes(shown) || shown === previews[tab].typed);
        return isTyped ? shown : data.preset || null;
    };

    // Measures, or ends the measurement that is running.
    toMeMeasure = tab => byId(`script_${tab}_tome_measure_${tasks[tab] ? "stop" : "start"}`).click();
    toMeMeasuring = function(tab, given) {
        const asked = {task: `task(tome-${Math.random().toString(36).slice(2)})`};
        for (const name of ["width", "height", "batch_size", "cfg_scale", "steps"]) {
            const value = read(tab, name);
            if (value !== null) asked[name] = value;
        }
        // The host says which size hires fix ends with.
        const hires = tab === "txt2img" && byId("txt2img_hr-checkbox")?.querySelector("input")?.checked;
        const size = hires && [...byId("txtimg_hr_finalres")?.querySelectorAll(".resolution") ?? []].pop();
        const sides = /(\d+)x(\d+)/.exec(size?.textContent ?? "");
        if (sides) [asked.hires_width, asked.hires_height] = sides.slice(1).map(Number);
        tasks[tab] = asked.task;
        nameMeasure(tab, "Interrupt");
        const lines = byId(`script_${tab}_tome_measure_lines`);
        if (typeof requestProgress === "function") requestProgress(asked.task, lines, null, () => {});
        return [JSON.stringify(asked), ...given.slice(1)];
    };
    toMeMeasuredTask = tab => tasks[tab];
    toMeMeasured = tab => {
        tasks[tab] = null;
        nameMeasure(tab, "Measure");
    };

    function nameMeasure(tab, name) {
        const button = byId(`script_${tab}_tome_measure`);
        const text = [...button.childNodes].filter(node => node.nodeType === Node.TEXT_NODE && node.data.trim()).pop();
        text?.replaceWith(name);  // WebUI's languages look at new nodes only.
    }

    // WebUI's languages replace whole texts. Lines of ours hold numbers: each part of a line is looked up, with {0}, {1}
    // and so on in their place.
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

    // A ratio that a person lowers takes the late ratio along: never more merging late than early.
    function keepLateRatioLow(ratio, late) {
        ratio?.addEventListener("change", event => {
            const input = late?.querySelector("input[type=number]");
            if (!input || Number(input.value) <= Number(event.target.value)) return;
            input.value = event.target.value;
            input.dispatchEvent(new Event("input"));
        });
    }

    // The title folds and unfolds by keyboard too: gradio's can't be reached by it.
    function makeReachable(title) {
        const tell = () => title.setAttribute("aria-expanded", title.classList.contains("open"));
        title.tabIndex = 0;
        title.setAttribute("role", "button");
        title.addEventListener("keydown", event => {
            // The switch lies in the title and has keys of its own.
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
                // A slider that is held still moves: wait until it is let go. Of two questions at a time gradio drops
                // the second: wait for the answer.
                if (held || asking || !previews[tab].connected) return;
                waiting = false;
                asking = true;
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

        // The tab's own sliders. One that is set by pasted parameters has no event but draws its track anew.
        for (const slider of ["width", "height", "steps"].map(name => byId(`${tab}_${name}`))) {
            slider?.addEventListener("input", refresh);
            const track = slider?.querySelector("input[type=range]");
            if (track) new MutationObserver(refresh).observe(track, {attributes: true, attributeFilter: ["style"]});
        }
        // A finished generation.
        for (const results of ["html_info", "html_log"].map(name => byId(`${name}_${tab}`))) {
            const finished = () => {
                translate(results, text => text.startsWith("ToMe: "));
                refresh();
            };
            if (results) new MutationObserver(finished).observe(results, {childList: true, subtree: true});
        }
        for (const lines of ["preview", "preset_message", "measure_lines"].map(name => byId(prefix + name))) {
            if (lines) new MutationObserver(() => translate(lines)).observe(lines, {childList: true, subtree: true});
        }
        byId(prefix + "preset")?.addEventListener("input", event => previews[tab].typed = event.target.value);
        keepLateRatioLow(byId(prefix + "ratio"), byId(prefix + "late_ratio"));
        const entitle = () => {
            const title = translated(preview.querySelector("[data-title]")?.dataset.title ?? "");
            const label = panel.querySelector(".label-wrap > span");
            if (!title || !label) return;
            const text = [...label.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).pop();
            if (text && text.textContent !== title) text.textContent = title;
        };
        new MutationObserver(entitle).observe(preview, {childList: true, subtree: true});
        refresh();
    }

    onUiLoaded(() => ["txt2img", "img2img"].forEach(follow));
})();
