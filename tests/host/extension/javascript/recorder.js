onUiLoaded(() => gradioApp().setAttribute("data-recorder", "loaded"));
