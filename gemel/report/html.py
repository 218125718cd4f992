"""Pieces of HTML: text escaped, tables, numbers that carry their exact value, figures with the table behind them."""

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already; everything else is escaped."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return str(self)


def as_html(value: object) -> Html:
    """A value as HTML: text is escaped."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def number(key: str, value: float, text: str) -> Html:
    """A number as people read it, with the key of the manifest that it is from, and its exact value."""
    return Html(f'<data data-key="{escape(key)}" value="{value!r}">{escape(text)}</data>')


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> Html:
    """A table whose first column names the rows; it scrolls within itself on a narrow screen."""
    heads = "".join(f'<th scope="col">{as_html(title)}</th>' for title in header)
    body = "".join(
        f'<tr><th scope="row">{as_html(row[0])}</th>{"".join(f"<td>{as_html(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    inner = f"<caption>{as_html(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody>"
    return scrolling(Html(f"<table>{inner}</table>"), caption)


def scrolling(content: str, label: str) -> Html:
    """Content that may be wider than the screen; it can be scrolled with the keyboard."""
    return Html(f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>')


def figure(picture: str, caption: str, numbers: Html) -> Html:
    """A picture, what it shows, and the same numbers as a table."""
    shown = scrolling(Html(picture), caption)
    behind = f"<details><summary>The numbers as a table</summary>{numbers}</details>"
    return Html(f"<figure><figcaption>{as_html(caption)}</figcaption>{shown}{behind}</figure>")


def section(title: str, *content: str) -> Html:
    """A section under a heading of its own."""
    return Html(f"<section><h2>{as_html(title)}</h2>{''.join(content)}</section>")


def paragraph(*content: object) -> Html:
    """Text and pieces of HTML in a row."""
    return Html(f"<p>{''.join(map(as_html, content))}</p>")
