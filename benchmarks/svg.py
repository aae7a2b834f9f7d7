"""Shapes, text and axes as SVG; colours are classes of plot.css, so that a plot follows the reader's colour scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path

WIDTH = 520.0  # units; text is 12 units high, so a plot stays legible at the width of a phone
_GLYPH = 6.9  # units: the mean width of a character in a wide face


@cache
def style() -> str:
    """The style sheet of the plots."""
    return Path(__file__).with_name("plot.css").read_text(encoding="utf-8")


def text_width(text: str) -> float:
    """About how wide a text is."""
    return _GLYPH * len(text)


def shortened(text: str, width: float) -> str:
    """The text, cut to about a width."""
    fits = int(width / _GLYPH)
    return text if len(text) <= fits else text[: max(1, fits - 1)].rstrip(" ,") + "…"


@dataclass
class Drawing:
    """Elements from back to front; `title` is what a screen reader says."""

    height: float
    title: str
    width: float = WIDTH
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(
            f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.0):.1f}" '
            f'height="{height:.1f}" rx="1.5"/>'
        )

    def trace(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" points="{path}"/>')

    def dot(self, x: float, y: float, radius: float, kind: str, hint: str = "") -> None:
        inner = f"<title>{escape(hint)}</title>" if hint else ""
        self.parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}">{inner}</circle>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        kind: str = "",
        *,
        anchor: str = "start",
        turn: float = 0.0,
    ) -> None:
        turned = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>'
            f"{escape(text)}</text>"
        )

    def render(self, *, standalone: bool = False) -> str:
        """The element; standalone: a file of its own, with background and style sheet."""
        box = f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" role="img" class="plot"'
        head = f"<title>{escape(self.title)}</title>"
        if standalone:
            size = f'width="{2 * self.width:.0f}" height="{2 * self.height:.0f}"'
            box = f'xmlns="http://www.w3.org/2000/svg" {size} {box}'
            head += f"<style>{style()}</style>"
            head += f'<rect class="paper" width="{self.width:.0f}" height="{self.height:.0f}"/>'
        return f"<svg {box}>{head}{''.join(self.parts)}</svg>"


@dataclass(frozen=True)
class Scale:
    """A logarithmic or linear map of [low, high] to [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        """The place of a value; outside the ends it is the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside: 1, 2 and 5 times powers of ten, or powers of ten alone over a long range."""
        if not self.log:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2.0))
            step *= next(f for f in (1, 2, 5, 10) if (self.high - self.low) / (step * f) <= 6)
            first = math.ceil(self.low / step)
            return [step * i for i in range(first, int(self.high / step + 1e-9) + 1)]
        factors = (1,) if self.high / self.low > 500 else (1, 2, 5)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        return [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least `gap` apart and inside [low, high] where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [0.0] * len(wanted)
    previous = low - gap
    for i in order:
        previous = places[i] = max(wanted[i], previous + gap)
    following = high + gap
    for i in reversed(order):
        following = places[i] = min(places[i], following - gap)
    return places
