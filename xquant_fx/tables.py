"""Tables for people, with rich, as plain text."""

from __future__ import annotations

from io import StringIO


def render(title: str, columns: list[str], rows: list[list[str]], note: str = "") -> str:
    """A table as text; ``note`` stands below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=140, highlight=False, color_system=None).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join([*lines, *([note] if note else [])])
