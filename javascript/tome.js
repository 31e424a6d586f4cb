// Keeps the panel's preview and title in step with what is set, without a server call while a slider is moving.
var toMeTabSize;

(function() {
    "use strict";

    const QUIET_MS = 250;
    const byId = id => gradioApp().querySelector("#" + id);

    // The tab's width, height and steps, in place of the last three values given.
    toMeTabSize = function(tab, given) {
        const read = name => {
            const input = byId(`${tab}_${name}`)?.querySelector("input[type=number]");
            return input ? Number(input.value) : null;
        };
        const own = given.slice(0, -3);
        return own.concat(["width", "height", "steps"].map((name, i) => read(name) ?? given[own.length + i]));
    };

    function follow(tab) {
        const prefix = `script_${tab}_tome_`;
        const panel = byId(prefix + "enabled");
        const preview = byId(prefix + "preview");
        if (!panel || !preview) return;
        let timer = null;
        let pressed = false;

        const refresh = () => {
            clearTimeout(timer);
            timer = setTimeout(() => {
                // A slider that is held still moves: wait until it is let go.
                if (pressed) return;
                byId(prefix + "refresh")?.click();
            }, QUIET_MS);
        };
        window.addEventListener("pointerdown", () => pressed = true, true);
        for (const end of ["pointerup", "pointercancel"]) {
            window.addEventListener(end, () => {
                if (pressed && timer) refresh();
                pressed = false;
            }, true);
        }

        const watched = [panel, ...["width", "height", "steps"].map(name => byId(`${tab}_${name}`))];
        for (const element of watched) {
            for (const kind of ["input", "change", "click"]) element?.addEventListener(kind, refresh);
        }
        // Presets, pasted parameters and a finished generation change things without an event of their own.
        const results = byId(`html_info_${tab}`);
        if (results) new MutationObserver(refresh).observe(results, {childList: true, subtree: true});
        new MutationObserver(() => {
            const title = preview.querySelector("[data-title]")?.dataset.title;
            const label = panel.querySelector(".label-wrap > span");
            if (!title || !label) return;
            const text = [...label.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).pop();
            if (text && text.textContent !== title) text.textContent = title;
        }).observe(preview, {childList: true, subtree: true});
        refresh();
    }

    onUiLoaded(() => ["txt2img", "img2img"].forEach(follow));
})();
