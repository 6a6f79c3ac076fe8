"""The timeline of a run as SVG: who led, what was broken where, what ended when, where nobody
decided. Pure: a history in, text out."""

from collections import Counter
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from chaos.checkers.availability import gaps
from chaos.history import (
    EntryRead,
    FaultBegan,
    FaultHealed,
    History,
    Phase,
    ProcessEnded,
    RunStarted,
    of,
)
from idl.ledger import Cancelled, DeadLettered, Finished, TermStarted

WIDTH: Final = 1200
LEFT: Final = 90
RIGHT: Final = 20
LANE: Final = 22
BARS: Final = 70
TOP: Final = 46
GAP_SHOWN_MS: Final = 250.0
"""Silences shorter than this are the ledger's normal breath at a few jobs a second."""
LABEL_MIN_PX: Final = 26
COLOURS: Final = {
    "kill": "#d62728", "stop": "#ff9896", "pause": "#ff7f0e", "partition": "#9467bd",
    "delay": "#8c564b", "loss": "#c49c94", "duplication": "#e377c2", "broker_kill": "#000000",
    "clock_jump": "#17becf", "disk_full": "#7f7f7f",
}  # fmt: skip
LEADERS: Final = ("#4c78a8", "#72b7b2", "#54a24b", "#eeca3b", "#b279a2", "#9d755d", "#bab0ac",
                  "#439894", "#83bcb6")  # fmt: skip


class _Canvas:
    """Scales time to x and collects elements."""

    def __init__(self, start_ms: float, end_ms: float) -> None:
        self.start_ms, self.end_ms = start_ms, max(end_ms, start_ms + 1)
        self.parts: list[str] = []

    def x(self, at_ms: float) -> float:
        share = (min(max(at_ms, self.start_ms), self.end_ms) - self.start_ms) / (
            self.end_ms - self.start_ms
        )
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def span(self, begin: float, end: float, y: float, height: float, colour: str, title: str,
             opacity: float = 1.0, label: str = "") -> None:  # fmt: skip
        x = self.x(begin)
        width = max(1.5, self.x(end) - x)
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill={quoteattr(colour)} fill-opacity="{opacity:g}"><title>{escape(title)}</title>'
            "</rect>"
        )
        if label and width >= LABEL_MIN_PX:
            self.text(x + 3, y + height - 6, label, "#fff")

    def text(self, x: float, y: float, text: str, colour: str = "#222", size: int = 11) -> None:
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}">'
            f"{escape(text)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = "#ddd") -> None:
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
        )


def timeline(history: History) -> str:
    """The picture. A history without a run gives an empty one."""
    started = next(iter(of(RunStarted, history)), None)
    times = [event.at_ms for event in history] or [0.0]
    load = next((p.at_ms for p in of(Phase, history) if p.name == "load"), times[0])
    settled = next((p.at_ms for p in of(Phase, history) if p.name == "settled"), max(times))
    canvas = _Canvas(load, settled)
    lanes = ["leader", *(started.processes if started else ())]
    lanes += sorted({t for f in of(FaultBegan, history) for t in f.targets} - set(lanes))
    bottom = TOP + LANE * len(lanes)
    title = f"{started.scenario}, seed {started.seed}" if started else "no run"
    canvas.text(LEFT, 18, title, size=14)
    _legend(canvas, history)
    _gaps(canvas, history, bottom + BARS)
    for index, name in enumerate(lanes):
        y = TOP + LANE * index
        canvas.text(8, y + 15, name)
        canvas.line(LEFT, y + LANE, WIDTH - RIGHT, y + LANE)
    _leaders(canvas, history, list(started.processes) if started else [])
    _faults(canvas, history, lanes)
    _ended(canvas, history, bottom)
    _axis(canvas, bottom + BARS)
    height = bottom + BARS + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(canvas.parts)}</svg>\n'
    )


def _legend(canvas: _Canvas, history: History) -> None:
    x = 330.0
    for kind in dict.fromkeys(fault.kind for fault in of(FaultBegan, history)):
        canvas.parts.append(
            f'<rect x="{x:.0f}" y="9" width="10" height="10" fill="{COLOURS.get(kind, "#999")}"/>'
        )
        canvas.text(x + 14, 18, kind)
        x += 30 + 7 * len(kind)
    canvas.parts.append(f'<rect x="{x:.0f}" y="9" width="10" height="10" fill="#fcc"/>')
    canvas.text(x + 14, 18, f"nobody decided (over {GAP_SHOWN_MS:.0f} ms)")


def _leaders(canvas: _Canvas, history: History, names: list[str]) -> None:
    terms = [
        (read.at_ms, read.entry.term, read.entry.leader)
        for read in of(EntryRead, history)
        if read.valid and isinstance(read.entry.decisions[0], TermStarted)
    ]
    for index, (at_ms, term, leader) in enumerate(terms):
        end = terms[index + 1][0] if index + 1 < len(terms) else canvas.end_ms
        if end > canvas.start_ms:
            colour = LEADERS[names.index(leader) % len(LEADERS)] if leader in names else "#999"
            canvas.span(at_ms, end, TOP + 3, LANE - 6, colour, f"term {term}: {leader}",
                        label=f"{leader}·{term}")  # fmt: skip


def _faults(canvas: _Canvas, history: History, lanes: list[str]) -> None:
    healed = {event.fault: event.at_ms for event in of(FaultHealed, history)}
    for fault in of(FaultBegan, history):
        end = healed.get(fault.fault, canvas.end_ms)
        for target in fault.targets:
            y = TOP + LANE * lanes.index(target) + 3
            colour = COLOURS.get(fault.kind, "#999")
            words = f"{fault.kind} {target} {fault.detail}, {end - fault.at_ms:.0f} ms"
            canvas.span(fault.at_ms, end, y, LANE - 6, colour, words, 0.85)
    for died in of(ProcessEnded, history):
        if died.process in lanes:
            y = TOP + LANE * lanes.index(died.process)
            canvas.text(canvas.x(died.at_ms) - 4, y + 16, "✗", "#d00", 14)


def _gaps(canvas: _Canvas, history: History, bottom: float) -> None:
    for gap in gaps(history):
        if gap.length_ms >= GAP_SHOWN_MS:
            canvas.span(gap.start_ms, gap.end_ms, TOP, bottom - TOP, "#fcc",
                        f"nobody decided for {gap.length_ms:.0f} ms ({gap.kind})")  # fmt: skip


def _ended(canvas: _Canvas, history: History, top: float) -> None:
    counts: Counter[int] = Counter()
    for read in of(EntryRead, history):
        if read.valid:
            ends = sum(
                isinstance(d, Finished | DeadLettered | Cancelled) for d in read.entry.decisions
            )
            counts[int((read.at_ms - canvas.start_ms) // 1000)] += ends
    most = max(counts.values(), default=0)
    canvas.text(8, top + 20, "jobs ended")
    canvas.text(8, top + 34, f"per s (≤ {most})")
    for second, count in counts.items():
        if second >= 0 and count:
            height = (BARS - 8) * count / most
            begin = canvas.start_ms + second * 1000
            canvas.span(begin, begin + 900, top + BARS - height, height, "#59a14f",
                        f"second {second}: {count}")  # fmt: skip


def _axis(canvas: _Canvas, y: float) -> None:
    canvas.line(LEFT, y, WIDTH - RIGHT, y, "#888")
    total_s = (canvas.end_ms - canvas.start_ms) / 1000
    step = next((s for s in (1, 2, 5, 10, 30, 60, 300, 600) if total_s / s <= 14), 1800)
    second = 0
    while second <= total_s:
        x = canvas.x(canvas.start_ms + second * 1000)
        canvas.line(x, y, x, y + 4, "#888")
        canvas.text(x - 8, y + 17, f"{second} s")
        second += step
