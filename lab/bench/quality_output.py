"""How `bench quality` shows a table: its heading, Markdown and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import output
from .contenders import UNMERGED
from .variants import Table

TITLES: dict[str, tuple[str, Callable[[object], str]]] = {
    "psnr": ("PSNR, dB", output.number(2)),
    "ssim": ("SSIM", output.number(4)),
}
"""Title of a metric, and the function that formats its values."""

Section = tuple[str, Sequence[output.Row]]


def heading(table: Table) -> str:
    """Return a table's title, and the references of its differences."""
    references = dict.fromkeys(row.reference for row in table.rows if row.reference is not None)
    names = ", ".join(repr(name) for name in dict.fromkeys(row.name for row in references))
    if not names:
        return f"{table.title}."
    last = ", the last one above" if len(references) > 1 else ""
    return f"{table.title}. Differences: to {names}{last}."


def markdown(rows: Sequence[output.Row]) -> str:
    """Format rows as Markdown, with a value and its interval in one cell."""
    columns: dict[str, tuple[str, Callable[[object], str]]] = {
        "row": ("row", str),
        "ratio": ("ratio", output.number(2)),
        "pairs": ("pairs", output.number(2)),
    }
    if len({row["steps"] for row in rows}) > 1:
        columns["steps"] = ("steps", str)
    if any(row["faster"] for row in rows):
        columns["faster"] = ("x faster", output.number(2))
    for name, (title, _) in TITLES.items():
        columns |= {name: (title, str), f"{name}_difference": ("difference", str)}
    columns["seconds"] = ("s/picture", output.number(2))
    return output.table(columns, [{**row, **_cells(row)} for row in rows])


def _cells(row: output.Row) -> dict[str, str]:
    """Cells of the metrics that a row has: value ± interval, and the difference in a word."""
    cells = {}
    for name, (_, write) in TITLES.items():
        if row[name] is not None:
            cells[name] = f"{write(row[name])} ± {write(row[f'{name}_interval'])}"
        column = f"{name}_difference"
        if row[column] is not None:
            sign = "-" if row[column] < 0 else "+"
            difference = f"{write(abs(row[column]))} ± {write(row[f'{column}_interval'])}"
            cells[column] = f"{sign}{difference} {row[f'{name}_verdict']}"
    return cells


def panels(table: Table, rows: Sequence[output.Row]) -> list[output.Panel]:
    """Plot each metric: a line per name over `table.over`, or a point per row."""
    merged = [row for row in rows if row["contender"] != UNMERGED]
    merged.sort(key=lambda row: row[table.over] if table.over else 0)
    plots = []
    for name, (title, _) in TITLES.items():
        panel = output.Panel(table.title.partition(":")[0], table.over or "", title)
        for row in merged:
            x, line = (row[table.over], row["row"]) if table.over else (row["row"], "merged")
            panel.add(line, x, row[name], row[f"{name}_interval"])
        plots.append(panel)
    return plots


def speed_panels(table: Table, rows: Sequence[output.Row]) -> list[output.Panel]:
    """Plot PSNR over speed-up, a line per name; empty if no speed-up is known."""
    panel = output.Panel("Distance over speed", "times faster than unmerged", TITLES["psnr"][0])
    for row in sorted((row for row in rows if row["faster"]), key=lambda row: row["faster"]):
        panel.add(row["row"], row["faster"], row["psnr"], row["psnr_interval"])
    return [panel] if table.over and panel.lines else []


def write_markdown(
    path: Path, sections: Sequence[Section], machine: output.Machine, notes: Sequence[str]
) -> None:
    """Write all tables so far as Markdown, for the documentation."""
    parts = [f"`{machine.command}` ({machine.machine}; {machine.versions}; {machine.date})"]
    for title, rows in sections:
        samples, scale = (rows[0][name] for name in ("samples", "scale"))
        steps = " or ".join(map(str, dict.fromkeys(row["steps"] for row in rows)))
        parts.append(f"**{title}** {samples} pictures per row, {steps} steps, guidance {scale:g}.")
        parts.append(markdown(rows))
    parts.append("\n".join(f"* {note}" for note in notes))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
