"""Draws the house: docs/rooms.svg, from the imports of the library (part of `make export`).

Left, each room with its modules, the ground floor below; right, how many imports lead from a room
(line) to another (column). All of them lie on one side of the diagonal: arrows point down only.
"""

import ast
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("utils", "toytown", "datasets", "evaluation", "learning", "methods", "viewing", "lab")
WHAT = {
    "lab": "rows, runs, the ledger, tables, claims",
    "viewing": "pictures",
    "methods": "seven papers and baselines",
    "learning": "batches, losses, backbones, the loop",
    "evaluation": "distances, scores, protocols",
    "datasets": "benchmarks as lists of images",
    "toytown": "people who do not exist",
    "utils": "arguments, memory, files",
}


def room_of(module: str) -> str:
    "The room of a dotted module below `reid_repro`; what lies at the top is a method."
    parts = module.split(".")
    return parts[1] if parts[1] in ROOMS else "methods"


def modules(root: Path = ROOT) -> dict[str, Path]:
    "Dotted name → file of every exported module."
    files = sorted((root / "reid_repro").rglob("*.py"))
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in files
        if not path.stem.startswith("_")
    }


def imported(module: str, text: str, known: set[str]) -> set[str]:
    "Those of `known` (modules and rooms) that a module imports, wherever in it the import stands."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            direct = {f"{base}.{alias.name}" for alias in node.names} & known
            found |= direct or {base}
    return found & known


def arrows(root: Path = ROOT) -> Counter:
    "(importing room, imported room) → number of modules that import, over all pairs of rooms."
    found = modules(root)
    known = {*found, *(f"reid_repro.{room}" for room in ROOMS)}
    count = Counter()
    for module, path in found.items():
        for other in imported(module, path.read_text(encoding="utf-8"), known):
            count[room_of(module), room_of(other)] += room_of(module) != room_of(other)
    return +count


def drawing(root: Path = ROOT) -> str:
    "The figure as SVG."
    inside = {room: [] for room in ROOMS}
    for module in modules(root):
        inside[room_of(module)].append(module.rpartition(".")[2])
    count, floors = arrows(root), ROOMS[::-1]
    height, cell, left = 46, 46, 640
    width, tall = left + 90 + cell * len(floors), 100 + height * len(floors)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {tall}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{tall}" fill="white"/>',
        '<text x="10" y="22" font-size="14" font-weight="bold">rooms and their modules</text>',
        f'<text x="{left + 90}" y="22" font-size="14" font-weight="bold">imports: from (line) '
        "to (column)</text>",
    ]
    for i, room in enumerate(floors):
        y = 80 + i * height
        shade = "#f2f5f9" if i % 2 else "#e3eaf3"
        names = ", ".join(inside[room])
        lines += [
            f'<rect x="10" y="{y}" width="{left}" height="{height - 4}" fill="{shade}"/>',
            f'<text x="20" y="{y + 18}" font-weight="bold">{room}</text>',
            f'<text x="100" y="{y + 18}" fill="#444">{escape(WHAT[room])}</text>',
            f'<text x="20" y="{y + 34}" font-size="9.5" fill="#444">{escape(names)}</text>',
            f'<text x="{left + 82}" y="{y + 25}" text-anchor="end">{room}</text>',
            f'<text transform="translate({left + 116 + i * cell},72) rotate(-35)">{room}</text>',
        ]
        for j, other in enumerate(floors):
            x, number = left + 90 + j * cell, count[room, other]
            fill = "#d9d9d9" if i == j else "#9ecae1" if number else "white"
            lines.append(
                f'<rect x="{x}" y="{y}" width="{cell - 4}" height="{height - 4}" fill="{fill}" '
                'stroke="#ccc"/>'
            )
            if number:
                lines.append(
                    f'<text x="{x + cell / 2 - 2:g}" y="{y + 25}" text-anchor="middle">'
                    f"{number}</text>"
                )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "rooms.svg").write_text(drawing(), encoding="utf-8")
