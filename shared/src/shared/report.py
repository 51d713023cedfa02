"""One self-contained HTML page a run: text, tables and figures inline, nothing fetched, light and dark.

Figures become inline SVG whose black and white follow the page's colours; a figure with very many points becomes PNG.
"""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.serialize import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHORT = 16  # characters of a text that stays on one line of a table
SVG_LIMIT = 1_500_000  # bytes; above it a bitmap is smaller and quicker to draw


def _number(value: Any) -> str:
    """A value as it stands in a table: four significant digits for floats."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def table_html(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """An HTML table; columns in order of first appearance, numbers right-aligned, missing cells empty.

    Text in the first column heads its row.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in columns)
    cells = ((_cell(row.get(column, ""), place == 0) for place, column in enumerate(columns)) for row in rows)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(caption or "Table")}">'
        f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any, first: bool) -> str:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if first and isinstance(value, str) and value:
        return f'<th scope="row">{html.escape(value)}</th>'
    text = _number(value)
    kind = " class=n" if numeric else " class=s" if len(text) <= SHORT else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def figure_svg(figure: "Figure", caption: str = "") -> str:
    """The figure as an <svg> element that follows the page's colours, or as an inline PNG where SVG would be huge.

    The caption is its name for who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "innerworks"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    if len(svg) > SVG_LIMIT:
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=160, bbox_inches="tight", facecolor="white")
        content = base64.b64encode(image.getvalue()).decode("ascii")
        return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{content}">'
    named = f'<svg role="img" aria-label="{html.escape(caption)}"'
    svg = svg[svg.index("<svg") :].replace("<svg", named, 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")


class Report:
    """A page under construction; parts appear in the order in which they were added."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def text(self, markdown: str) -> None:
        """Add Markdown text (CommonMark with tables; raw HTML is shown, not rendered)."""
        from markdown_it import MarkdownIt

        parser = MarkdownIt("commonmark", {"html": False}).enable("table")
        self._parts.append(f'<div class="text">{parser.render(markdown)}</div>')

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """Add a table of mappings, one a row."""
        self._parts.append(table_html(rows, caption))

    def figure(self, figure: "Figure", caption: str) -> None:
        """Add a matplotlib figure with its caption."""
        self._parts.append(
            f"<figure>{figure_svg(figure, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def html(self, fragment: str) -> None:
        """Add an HTML fragment as it is; it must not load anything from elsewhere."""
        self._parts.append(fragment)

    def write(
        self, path: Path, metrics: Mapping[str, Any] | None = None, manifest: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the page, atomically; `metrics` and `manifest` become tables at its end. Returns `path`."""
        from jinja2 import Environment, PackageLoader

        template = Environment(loader=PackageLoader("shared"), autoescape=True).get_template("report.html.j2")
        page = template.render(
            title=self.title,
            parts=self._parts,
            metrics=table_html(
                [{"metric": key, "value": value} for key, value in flatten(metrics or {}).items()]
            ),
            manifest=table_html(
                [{"item": key, "value": value} for key, value in flatten(manifest or {}).items()]
            ),
            status=(manifest or {}).get("status"),
            error=(manifest or {}).get("error"),
            other_code=(manifest or {}).get("stages_of_other_code", {}),
        )
        with atomic_path(path) as partial:
            partial.write_text(page, encoding="utf-8")
        return path
