"""The picture of the rooms of stem_fast and the imports between them, drawn from the source."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports() -> dict[str, set[str]]:
    """Room of stem_fast -> rooms that its files import when they are loaded: imports within
    functions and for type checkers are left out."""
    package = ROOT / "stem_fast"
    found: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0].startswith("_"):
            continue
        uses = found.setdefault(parts[0], set())
        for node in ast.iter_child_nodes(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                room = [*name.split("."), ""][1]
                if name.startswith("stem_fast.") and (
                    (package / room).is_dir() or (package / f"{room}.py").exists()
                ):
                    uses.add(room)
    return {room: uses - {room, "kernels"} for room, uses in found.items()}


def needs_of(room: str, graph: dict[str, set[str]]) -> set[str]:
    """All rooms below a room."""
    found: set[str] = set()
    for each in graph[room]:
        found |= {each} | needs_of(each, graph)
    return found


def picture() -> str:
    """The rooms as an SVG: each stands above what it imports. A line that follows from others is
    left out."""
    graph = imports()
    direct = {
        room: {a for a in uses if not any(a in needs_of(b, graph) for b in uses - {a})}
        for room, uses in graph.items()
    }
    level: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        level[room] = 1 + max((level[each] for each in graph[room]), default=-1)
    floors = [[r for r in graph if level[r] == floor] for floor in range(max(level.values()) + 1)]
    width, height, gap = 128, 40, 44
    across = max(map(len, floors))
    total = across * (width + 24)
    top = len(floors) * (height + gap) - gap
    place = {}
    for floor, row in enumerate(floors):
        for i, room in enumerate(sorted(row)):
            x = total * (i + 1) / (len(row) + 1)
            place[room] = x, top - height - floor * (height + gap)
    lines = []
    for room, uses in direct.items():
        x, y = place[room]
        for each in sorted(uses):
            to_x, to_y = place[each]
            middle = (y + height + to_y) / 2
            lines.append(
                f'<path d="M{x:.0f},{y + height} C{x:.0f},{middle:.0f} {to_x:.0f},{middle:.0f} '
                f'{to_x:.0f},{to_y}"/>'
            )
    boxes = [
        f'<g><rect x="{x - width / 2:.0f}" y="{y}" width="{width}" height="{height}" rx="4"/>'
        f'<text x="{x:.0f}" y="{y + height / 2 + 5:.0f}">{room}</text></g>'
        for room, (x, y) in place.items()
    ]
    return (
        f'<svg class="rooms" viewBox="0 0 {total} {top}" role="img" '
        'aria-label="Rooms of stem_fast and the imports between them" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(lines)}{"".join(boxes)}</svg>'
    )
