"""Plots as inline SVG: they need no script, and each mark says its numbers when pointed at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graphopt.report.markup import Markup, tag
from graphopt.report.scales import Axis

HEIGHT = 280
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 12, 46
COLOURS = 6

_SHAPES = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0Z",
    "M-3 -3H3V3H-3Z",
    "M0 -4L4 3H-4Z",
    "M0 -4.4L4.4 0L0 4.4L-4.4 0Z",
    "M-4 -3H4L0 4Z",
    "M-4.2 -1.2H-1.2V-4.2H1.2V-1.2H4.2V1.2H1.2V4.2H-1.2V1.2H-4.2Z",
)
"""One for each colour, so that they tell apart what colours do not."""


@dataclass(frozen=True)
class Frame:
    """The area between two axes, ``width`` wide with their labels.

    ``name`` is unique on the page.
    """

    name: str
    x: Axis
    y: Axis
    width: int = 960

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates of a point."""
        return self.across(self.x.at(x)), self.down(self.y.at(y))

    def across(self, share: float) -> float:
        return LEFT + share * (self.width - LEFT - RIGHT)

    def down(self, share: float) -> float:
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def draw(self, title: str, told: str, *marks: str, behind: Markup | None = None) -> Markup:
        """The picture; ``title`` and ``told`` describe it to those who do not see it."""
        ids = f"{self.name}-title", f"{self.name}-told"
        return tag(
            "svg",
            tag("title", title, id=ids[0]),
            tag("desc", told, id=ids[1]),
            behind or Markup(),
            *self._rulers(),
            *marks,
            class_="plot",
            viewBox=f"0 0 {self.width} {HEIGHT}",
            role="img",
            aria_labelledby=" ".join(ids),
        )

    def _rulers(self) -> Iterator[Markup]:
        left, right, low = self.across(0), self.across(1), self.down(0)
        for value, label in self.y.ticks:
            y = self.down(self.y.at(value))
            yield line(left, y, right, y, "grid")
            yield text(left - 8, y + 4, label, "end")
        for value, label in self.x.ticks:
            x = self.across(self.x.at(value))
            yield line(x, low, x, low + 4, "rule")
            yield text(x, low + 17, label, "middle")
        yield line(left, low, right, low, "rule")
        yield text((left + right) / 2, HEIGHT - 8, self.x.title, "middle", "name")
        middle = (self.down(0) + self.down(1)) / 2
        turned = f"rotate(-90 14 {number(middle)})"
        yield text(14, middle, self.y.title, "middle", "name", transform=turned)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    ends = {k: number(v) for k, v in zip(("x1", "y1", "x2", "y2"), (x1, y1, x2, y2), strict=True)}
    return tag("line", class_=kind, **ends)


def text(x: float, y: float, words: str, anchor: str, kind: str = "", **more: str) -> Markup:
    place = {"x": number(x), "y": number(y), "text_anchor": anchor}
    return tag("text", words, class_=kind or None, **place, **more)


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    size = {"width": number(max(width, 0.0)), "height": number(max(height, 0.0))}
    return tag("rect", class_=kind, x=number(x), y=number(y), **size)


def marker(x: float, y: float, colour: int, kind: str = "", *, small: bool = False) -> Markup:
    shape = _SHAPES[colour % COLOURS]
    place = f"translate({number(x)} {number(y)})" + (" scale(0.6)" if small else "")
    return tag("path", d=shape, transform=place, class_=f"s{colour % COLOURS} {kind}".strip())


def told(words: str, *shapes: Markup) -> Markup:
    """Shapes that say ``words`` when pointed at."""
    return tag("g", tag("title", words), *shapes)


def joined(points: Iterable[tuple[float, float]], kind: str) -> Markup:
    """A line through points."""
    places = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return tag("polyline", points=places, class_=kind) if places else Markup()


def legend(names: Sequence[str]) -> Markup:
    """What the colours and shapes of `marker` stand for."""
    keys = (
        tag("span", tag("svg", marker(6, 6, i), viewBox="0 0 12 12", aria_hidden="true"), name)
        for i, name in enumerate(names)
    )
    return tag("p", *keys, class_="keys")
