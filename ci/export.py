"""What nbdev-export leaves to do: docstrings of modules, folded lists, and what each room offers.

Part of `make export`. The comment under a notebook's `#| default_exp` becomes the docstring of its
module; `reid_repro/<room>/__init__.pyi` lists the public names of the room's modules;
docs/rooms.svg is drawn from the imports.
"""

import ast
import json
import re
import textwrap
from pathlib import Path

from architecture import drawing

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
HEADER = re.compile(r'\A""".*?"""\n', re.DOTALL)
NAMES = re.compile(r"^__all__ = \[(.*?)\]$", re.MULTILINE | re.DOTALL)


def public(module: Path) -> list[str]:
    "The names in a module's `__all__`, in its order."
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def documentation(notebook: Path) -> dict[str, str]:
    "{module: the comment under its `#| default_exp`}, at most one; ValueError where it is missing."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        found = re.match(r"#\| default_exp (\S+)\n?", source)
        if cell["cell_type"] == "code" and found:
            lines = [line.removeprefix("#").removeprefix(" ") for line in source.splitlines()[1:]]
            text = "\n".join(lines).strip()
            if not text:
                raise ValueError(
                    f"{notebook}: say below '{source.strip()}', in comment lines, what is in it"
                )
            return {found[1]: text}
    return {}


def finished(text: str, documented: str) -> str:
    "A module's text with its docstring and with `__all__` folded at `WIDTH`."
    end = '\n"""\n' if "\n" in documented else '"""\n'
    text = HEADER.sub(lambda _: f'"""{documented}{end}', text, count=1)
    names = NAMES.search(text)
    if names:
        # a list that was folded before ends with a comma
        listed = textwrap.fill(
            " ".join(names[1].split()).rstrip(","), WIDTH, initial_indent=" " * 4,
            subsequent_indent=" " * 4,
        )
        text = text.replace(names[0], f"__all__ = [\n{listed},\n]" if names[1] else "__all__ = []")
    return text


def stub(room: Path) -> str:
    "Re-exports of the public names of a room's modules; ValueError where two offer one name."
    lines, owner = [], {}
    for module in sorted(room.glob("*.py")):
        for name in public(module) if module.stem != "__init__" else ():
            if name in owner:
                raise ValueError(
                    f"{room.name}: '{name}' is public in {owner[name]} and in {module.stem}; "
                    "rename one of them"
                )
            owner[name] = module.stem
            lines.append(f"from .{module.stem} import {name} as {name}")
    return "\n".join(lines) + "\n"


def update(path: Path, text: str) -> None:
    "Writes what has changed, nothing else."
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    for notebook in sorted(ROOT.glob("nbs/**/*.ipynb")):
        for module, documented in documentation(notebook).items():
            path = ROOT / "reid_repro" / (module.replace(".", "/") + ".py")
            update(path, finished(path.read_text(encoding="utf-8"), documented))
    for room in sorted(path.parent for path in ROOT.glob("reid_repro/*/__init__.py")):
        update(room / "__init__.pyi", stub(room))
    update(ROOT / "docs" / "rooms.svg", drawing(ROOT))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(str(error)) from None
