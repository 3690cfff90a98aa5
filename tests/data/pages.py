"""An HTML page, read back as a tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset({"meta", "img", "br"})


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list = field(default_factory=list)  # elements and text

    def all(self, tag: str, css: str = "") -> list[Element]:
        """Every element below, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                classes = (child.attributes.get("class") or "").split()
                found += [child] if child.tag == tag and (not css or css in classes) else []
                found += child.all(tag, css)
        return found

    @property
    def raw(self) -> str:
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    @property
    def text(self) -> str:
        return " ".join(self.raw.split())


class Page(HTMLParser):
    """The tree of a page; fails on an element that is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.every: list[Element] = []
        self.feed(source)
        self.close()
        assert len(self.open) == 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.every.append(element)
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def article(self, key: str) -> Element:
        (found,) = (article for article in self.root.all("article") if article.all("h3")[0].text == key)
        return found
