"""Threads over the steps of an answer, and the slots that they hold: when each wrote, and how much at once."""

from __future__ import annotations

from collections import Counter
from html import escape

from medusa_apar.events.recording import Recording

from .names import HUES, count, hue, name, state
from .picture import Picture, Recorded, sources

_LEFT, _WIDTH, _LANE, _SLOTS = 74, 860, 17, 64  # pixels
_DIGITS = 9  # pixels a step, from which on the counts are written into their boxes


def timeline(output: Recorded | Recording, row: int = 0, sequential: bool = False) -> Picture:
    """One row's threads, a box for each step in which a thread wrote, as high as the tokens it gained at once.

    Below, unless other rows share the pool, the KV slots in use over the steps, beside what one thread would hold.

    sequential: draws decoding one token at a time above, on the same axis.
    """
    recording, _ = sources(output, None)
    steps, tokens = _last_step(recording, row), recording.readable(row)
    return Picture(timeline_svg(recording, row, sequential), f"{tokens} tokens in {steps} steps")


def timeline_svg(recording: Recording, row: int, sequential: bool = False) -> str:
    tree, steps, tokens = recording.trees[row], _last_step(recording, row), recording.readable(row)
    if not steps:
        return ""
    scale = (_WIDTH - _LEFT) / max(tokens if sequential else 0, steps)
    html, y = [], 14
    if sequential:
        html.append(_label(y, "one by one"))
        html.append(_bar(_LEFT, y + 2, tokens * scale, _LANE - 4, "ma-one", f"one token a step: {tokens} steps"))
        html.append(_note(_LEFT + tokens * scale - 4, y + _LANE - 6, f"one token a step: {tokens} steps", "end"))
        y += _LANE + 4
    for thread in tree.depth_first():
        gained = Counter(origin.step for origin in recording.origins[thread])
        begun, ended = recording.started[thread], min(recording.finished.get(thread, steps), steps)
        label = ("· " * thread.depth) + name(thread).removeprefix("thread ")
        about = f"{name(thread)}, from step {max(begun, 1)} to {ended}: {count(sum(gained.values()))}, {state(thread)}"
        html.append(f'<g class="ma-h{hue(thread, HUES)}"><title>{escape(about)}</title>{_label(y, label)}')
        html.append(_bar(_x(max(begun, 1), scale), y + _LANE - 2, max(ended - begun, 0) * scale, 1, "ma-life", about))
        for step, gain in gained.items():
            if step > steps:
                continue
            height = min(4 + 2.4 * gain, _LANE - 2)
            place = _x(step, scale), y + _LANE - 1 - height, max(scale - 0.8, 0.6), height
            html.append(_bar(*place, "ma-box", f"step {step}: {count(gain)}"))
            if scale >= _DIGITS and gain > 1:
                centre = _x(step, scale) + scale / 2
                html.append(f'<text class="ma-count" x="{centre:.1f}" y="{y + _LANE - 4}">{gain}</text>')
        html.append("</g>")
        y += _LANE
    if sequential:
        html.append(_note(_x(steps + 1, scale) + 6, y - _LANE + 4, f"threads and guesses: {steps} steps"))
    html.append(_axis(y, max(tokens if sequential else 0, steps), scale))
    y += 26
    if len(recording.trees) == 1:
        html.append(_slots(recording, y, tokens, scale))
        y += _SLOTS + 6
    title = f"{tokens} tokens in {steps} steps by {len(tree.threads)} threads"
    return (
        f'<svg class="ma-timeline" viewBox="0 0 {_WIDTH} {y}" role="img" aria-label="{title}" width="{_WIDTH}">'
        f"{''.join(html)}</svg>"
    )


def _last_step(recording: Recording, row: int) -> int:
    """In which the row's last thread ended."""
    threads = recording.trees[row].threads
    return max((recording.finished.get(thread, len(recording.steps)) for thread in threads), default=0)


def _slots(recording: Recording, y: int, tokens: int, scale: float) -> str:
    """The area of slots in use, and a line for one thread that has written as much: prompt and text so far."""
    prompt = recording.trees[0].trunk.num_forced
    steps = recording.steps
    most = max(prompt + tokens, *(step.slots_used for step in steps))
    used = max(step.slots_used for step in steps)

    def height(slots: int) -> float:
        return y + _SLOTS - 2 - (_SLOTS - 14) * slots / most

    area = [f"M{_LEFT:.1f} {height(0):.1f}"]
    for step in steps:
        area.append(f"V{height(step.slots_used):.1f}H{_x(step.step + 1, scale):.1f}")
    area.append(f"V{height(0):.1f}Z")
    whole = prompt + tokens
    room = _x(len(steps) + 1, scale) < _WIDTH - 80
    side = "start" if room else "end"
    return (
        f"{_label(y + _SLOTS / 2 - _LANE / 2, 'KV slots')}"
        f'<path class="ma-slots" d="{"".join(area)}"><title>at most {used} slots</title></path>'
        f'<line class="ma-whole" x1="{_LEFT}" x2="{_WIDTH}" y1="{height(whole):.1f}" y2="{height(whole):.1f}"/>'
        f"{_note(_LEFT + 3, height(whole) - 3, f'one thread would end with {whole}')}"
        f"{_note(_x(len(steps) + 1, scale) + (6 if room else -4), y + _SLOTS - 5, f'at most {used}', side)}"
    )


def _axis(y: float, steps: int, scale: float) -> str:
    every = next(every for every in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if steps <= 12 * every)
    places = [(step, _x(step, scale) + scale / 2) for step in range(every, steps + 1, every)]
    marks = [_note(min(x, _WIDTH - 10), y + 12, str(step), "middle") for step, x in places]
    return f"{_label(y - 3, 'step')}{''.join(marks)}"


def _x(step: int, scale: float) -> float:
    return _LEFT + (step - 1) * scale


def _label(y: float, text: str) -> str:
    return f'<text class="ma-lane-name" x="{_LEFT - 6}" y="{y + _LANE - 5:.1f}">{escape(text)}</text>'


def _note(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="ma-axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, height: float, css: str, title: str) -> str:
    return (
        f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )
