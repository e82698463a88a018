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
    # A room stands as high as its users let it, so that few lines pass other rooms.
    order = [*TopologicalSorter(graph).static_order()]
    level: dict[str, int] = {}
    for room in order:
        level[room] = 1 + max((level[each] for each in graph[room]), default=-1)
    for room in reversed(order):
        users = [level[each] for each in graph if room in graph[each]]
        level[room] = min(users, default=level[room] + 1) - 1
    floors = [[r for r in graph if level[r] == floor] for floor in range(max(level.values()) + 1)]
    width, height, gap = 120, 36, 40
    top = len(floors) * (height + gap) - gap + 2
    across = dict.fromkeys(graph, 0.0)  # of the middle of each box
    for row in floors:
        # Over the rooms that it imports, as near as neighbours allow.
        wish = {r: [across[each] for each in direct[r]] or [i * 260.0] for i, r in enumerate(row)}
        lean = {r: sum(across[each] for each in graph[r]) / max(len(graph[r]), 1) for r in row}
        row.sort(key=lambda r: (sum(wish[r]) / len(wish[r]), lean[r]))
        for i, room in enumerate(row):
            across[room] = sum(wish[room]) / len(wish[room])
            if i:
                across[room] = max(across[room], across[row[i - 1]] + width + 20)
        shift = sum(across[r] - sum(wish[r]) / len(wish[r]) for r in row) / len(row)
        for room in row:
            across[room] -= shift
    left = min(across.values()) - width / 2 - 1
    total = max(across.values()) + width / 2 + 1 - left
    place = {
        room: (across[room] - left, top - 1 - height - level[room] * (height + gap))
        for room in graph
    }
    lines = [
        f'<line x1="{place[room][0]:.0f}" y1="{place[room][1] + height}" '
        f'x2="{place[each][0]:.0f}" y2="{place[each][1]}"/>'
        for room, uses in direct.items()
        for each in sorted(uses)
    ]
    boxes = [
        f'<rect x="{x - width / 2:.0f}" y="{y}" width="{width}" height="{height}" rx="4"/>'
        f'<text x="{x:.0f}" y="{y + height / 2 + 5:.0f}">{room}</text>'
        for room, (x, y) in place.items()
    ]
    return (
        f'<svg class="rooms" viewBox="0 0 {total:.0f} {top}" width="{total:.0f}" role="img" '
        'aria-label="Rooms of stem_fast and the imports between them" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(lines)}{"".join(boxes)}</svg>'
    )
