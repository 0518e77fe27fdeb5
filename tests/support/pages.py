"""Parse an HTML page with the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = ("meta", "link", "input", "br", "hr", "img")


@dataclass
class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: Name and attributes of every element, in order.
        tables: Rows of cells by caption.
        items: Texts of list items.
    """

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, html: str) -> Page:
        page = cls()
        page.open, page.caption = [], None
        HTMLParser.__init__(page)
        page.feed(html)
        page.close()
        assert not page.open, page.open
        return page

    def attributes(self, name: str, tag: str | None = None) -> list[str]:
        """Values of an attribute, of one kind of element or of all."""
        return [given[name] for kind, given in self.tags if name in given and tag in (None, kind)]

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """Cells of a table by row heading and column heading."""
        head, *rows = self.tables[caption]
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        elif tag == "tr":
            self.tables[self.caption].append([])
        elif tag in ("td", "th"):
            self.tables[self.caption][-1].append("")
        elif tag == "li":
            self.items.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        if tag == "caption":
            self.tables[self.caption] = []

    def handle_data(self, data):
        if "caption" in self.open:
            self.caption += data
        elif "td" in self.open or "th" in self.open:
            self.tables[self.caption][-1][-1] += data.strip()
        elif "li" in self.open:
            self.items[-1] += data
