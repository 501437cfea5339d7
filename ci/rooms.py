"""Writes what each room of the library offers, reid_repro/<room>/__init__.pyi, from the public names of its modules: part of `make export`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def public(module: Path) -> list[str]:
    "The names in a module's `__all__`, in its order."
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def stub(room: Path) -> str:
    "Re-exports of all public names of a room's modules; ValueError where two modules offer one name."
    lines, owner = [], {}
    for module in sorted(room.glob("*.py")):
        for name in public(module) if module.stem != "__init__" else ():
            if name in owner:
                raise ValueError(f"{room.name}: '{name}' is public in {owner[name]} and in {module.stem}; rename one of them")
            owner[name] = module.stem
            lines.append(f"from .{module.stem} import {name} as {name}")
    return "\n".join(lines) + "\n"


def main() -> None:
    for room in sorted(path.parent for path in ROOT.glob("reid_repro/*/__init__.py")):
        target = room / "__init__.pyi"
        try:
            text = stub(room)
        except ValueError as error:
            sys.exit(str(error))
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
