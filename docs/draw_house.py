"""Draw the rooms of the library on their floors, with the imports that the files have: `python docs/draw_house.py`.

Writes `docs/img/house.svg`, of `docs/architecture.md`. A line that others imply is left out: `cli` imports `core`, as
much that `cli` imports does. A test compares the file with what this script draws now.
"""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

import house  # noqa: E402

PICTURE = DOCS / "img" / "house.svg"
#: places of the rooms of `house.FLOORS`, in columns: no line runs through the box of another room
COLUMNS = (
    *((1.5, 4), (1.5,), (0.5,), (2.2, 3.4), (0.9,), (0, 3.4), (1.7,), (1.6, 0), (2.3, 0.1, 1.1)),
    *((0.4, 3.6), (3.4,), (3.4, 1.5, 0.5, 2.45), (2.4,)),
)
COLUMN, FLOOR, WIDTH, HEIGHT, MARGIN = 180, 62, 144, 34, 20
KINDS = {
    "without PyTorch and frameworks": "#dcedc8",
    "with PyTorch": "#fff3cd",
    "with NeMo and Megatron too": "#d6e4f5",
}


def lines() -> list[tuple[str, str]]:
    """Return (room, room that it imports), sorted, without those that other imports imply."""
    rooms = {room for floor in house.FLOORS for room in floor}
    edges = {edge for edge in house.edges() if rooms.issuperset(edge)}

    def reached(room: str, skipped: tuple[str, str]) -> set[str]:
        below = {low for high, low in edges if high == room and (high, low) != skipped}
        return below.union(*(reached(low, skipped) for low in below))

    return sorted(edge for edge in edges if edge[1] not in reached(edge[0], edge))


def colour(room: str) -> str:
    """Return a room's colour, by what its files may import."""
    without, torch, frameworks = KINDS.values()
    return without if room in house.WITHOUT_TORCH else frameworks if room in house.KNOW_FRAMEWORKS else torch


def svg() -> str:
    """Return the picture."""
    top = len(house.FLOORS) - 1
    places = {
        room: (MARGIN + round(column * COLUMN) + WIDTH // 2, MARGIN + (top - floor) * FLOOR + HEIGHT // 2)
        for floor, (rooms, columns) in enumerate(zip(house.FLOORS, COLUMNS, strict=True))
        for room, column in zip(rooms, columns, strict=True)
    }
    width = max(x for x, _ in places.values()) + WIDTH // 2 + MARGIN
    legend = MARGIN + len(house.FLOORS) * FLOOR
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {legend + HEIGHT}" font-family="sans-serif" '
        'font-size="15" text-anchor="middle">',
        '<marker id="tip" orient="auto" markerWidth="8" markerHeight="8" refX="7" refY="4">'
        '<path d="M0,1 L7,4 L0,7" fill="none" stroke="#777"/></marker>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for high, low in lines():
        (x1, y1), (x2, y2) = places[high], places[low]
        parts.append(
            f'<line x1="{x1}" y1="{y1 + HEIGHT // 2}" x2="{x2}" y2="{y2 - HEIGHT // 2}" stroke="#777" '
            f'marker-end="url(#tip)"><title>{high} imports {low}</title></line>'
        )
    for room, (x, y) in places.items():
        parts += [
            f'<rect x="{x - WIDTH // 2}" y="{y - HEIGHT // 2}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
            f'fill="{colour(room)}" stroke="#555"/>',
            f'<text x="{x}" y="{y + 5}">{room}</text>',
        ]
    for number, (text, fill) in enumerate(KINDS.items()):
        x = MARGIN + number * (width - 2 * MARGIN) // len(KINDS)
        parts += [
            f'<rect x="{x}" y="{legend}" width="16" height="16" fill="{fill}" stroke="#555"/>',
            f'<text x="{x + 24}" y="{legend + 13}" text-anchor="start" font-size="13">{text}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg())
    print(PICTURE)
