"""Begins the reproduction of another paper: `make new-paper NAME=foo`.

Copies a small method that works, from the equation to the table, to be replaced by the paper's:
ci/template with another name as a pair of notebooks (then executed), rows, tests and profiles'
entries, an empty file of reported numbers, and the name in `ledger.PAPERS`.
"""

import argparse
import keyword
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "ci" / "template"
LEDGER = "nbs/B_engine_room/07_ledger.ipynb"
HEADER = "table,row,dataset,protocol,metric,value,own,note\n"
PAPERS = re.compile(r"^PAPERS = \{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)


def folder(name: str, root: Path) -> str:
    "nbs/5_papers/N_name, N the number behind the last paper's."
    paths = [path for path in (root / "nbs/5_papers").glob("[0-9]*_*") if path.is_dir()]
    numbers = [int(path.name.partition("_")[0]) for path in paths]
    return f"nbs/5_papers/{max(numbers, default=0) + 1}_{name}"


def new_files(name: str, place: str) -> dict[str, str]:
    "{file of the template: file that it becomes}."
    return {
        "1_derive.md": f"{place}/1_derive.ipynb", "2_reproduce.md": f"{place}/2_reproduce.ipynb",
        "rows.yaml": f"ci/rows/{name}.yaml", "test_newpaper.py": f"tests/methods/test_{name}.py",
    }


def check(name: str, root: Path) -> None:
    "ValueError saying why `name` cannot be a paper's."
    from reid_repro.lab.ledger import PAPERS
    from reid_repro.lab.rows import GROUPS

    if not name:
        raise ValueError("give the paper a name: make new-paper NAME=foo")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > 20:
        raise ValueError(
            f"NAME={name!r} becomes a module and a folder: a letter first, then a to z, 0 to 9,"
            " single _, at most 20 in all"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ValueError(f"NAME={name} is a word of Python's own; a module cannot be called so")
    if name in GROUPS:
        raise ValueError(
            f"NAME={name} is a group of papers in `make reproduce ONLY=…`; take another name"
        )
    files = [*new_files(name, folder(name, root)).values(), f"reid_repro/reported/{name}.csv"]
    taken = [file for file in (f"reid_repro/{name}.py", f"reid_repro/{name}", *files)
             if (root / file).exists()]
    if taken or name in PAPERS:
        raise ValueError(
            f"NAME={name} is taken: {taken[0] if taken else 'ledger.PAPERS'} has it; take another"
            " name"
        )


def notebook(text: str) -> nbformat.NotebookNode:
    """A notebook from Markdown: fences marked `python` become code (a further word is a tag), a
    line `+++` parts two texts.
    """
    cells, tags = [], []
    parts = re.split(r"^```python(.*)\n((?:.*\n)*?)```$", text, flags=re.MULTILINE)
    for i, part in enumerate(parts):
        if i % 3 == 0:
            pieces = re.split(r"^\+\+\+$", part, flags=re.MULTILINE)
            cells += [new_markdown_cell(piece.strip()) for piece in pieces if piece.strip()]
        elif i % 3 == 1:
            tags = part.split()
        else:
            metadata = {"tags": tags} if tags else {}
            cells.append(new_code_cell(part.rstrip("\n"), metadata=metadata))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def add_to_ledger(name: str, title: str, root: Path) -> None:
    "A line for the paper in PAPERS, behind the last one."
    ledger = nbformat.read(root / LEDGER, 4)
    for cell in ledger.cells:
        cell.source = PAPERS.sub(rf'PAPERS = {{\n\1    "{name}": "{title}",\n}}', cell.source)
    nbformat.write(ledger, root / LEDGER)


def add_to_profile(profile: str, entry: str, root: Path) -> None:
    "The entry at the end of the profile's `papers`."
    path = root / "ci" / "profiles" / f"{profile}.yaml"
    before, mark, papers = path.read_text(encoding="utf-8").partition("\npapers:\n")
    if not mark:
        raise ValueError(f"{path.name} has no line 'papers:' for the entry of the new paper")
    lines = papers.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith(" ")), len(lines))
    lines[end:end] = [f"  {line}" for line in entry.splitlines()]
    path.write_text(before + mark + "\n".join(lines) + "\n", encoding="utf-8")


def write(name: str, root: Path) -> str:
    "Copies the template under another name into the project at `root`; returns its folder."
    title, place = "".join(word.capitalize() for word in name.split("_")), folder(name, root)

    def named(file: str) -> str:
        text = (TEMPLATE / file).read_text(encoding="utf-8")
        text = text.replace("nbs/5_papers/6_newpaper", place)
        return text.replace("newpaper", name).replace("NewPaper", title)

    (root / place).mkdir()
    for file, path in new_files(name, place).items():
        if file.endswith(".md"):
            nbformat.write(notebook(named(file)), root / path)
        else:
            (root / path).write_text(named(file), encoding="utf-8")
    (root / "reid_repro" / "reported" / f"{name}.csv").write_text(HEADER, encoding="utf-8")
    for profile, entry in yaml.safe_load(named("profiles.yaml")).items():
        add_to_profile(profile, entry, root)
    add_to_ledger(name, title, root)
    return place


def execute(place: str, root: Path) -> None:
    "Exports the modules, runs both notebooks and cleans them, with the library of `root`."
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    made = [f"{place}/1_derive.ipynb", f"{place}/2_reproduce.ipynb"]
    commands = [["nbdev-export"], [sys.executable, "ci/export.py"]]
    commands += [["nbdev-test", "--save", "--n-workers", "0", name] for name in made]
    commands += [["nbdev-clean", "--fname", name] for name in (LEDGER, *made)]
    commands += [[sys.executable, "ci/readme.py"]]  # the reading order of the start page
    for command in commands:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}\n"
                f"what was written stays; `git status` lists it"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the module, the folder and the rows: a to z, 0 to 9 and _")
    name = parser.parse_args().name
    try:
        check(name, ROOT)
        place = write(name, ROOT)
        print(f"executing {place}/1_derive.ipynb and 2_reproduce.ipynb: a minute", flush=True)
        execute(place, ROOT)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"""`git status` lists what was written. PAPERS in {LEDGER} names the paper now.
Next: replace the method in {place}/1_derive.ipynb by the paper's, equation by equation;
docs/adding_a_paper.md says how.
  make reproduce ONLY={name}    trains its rows on Toytown
  make test                    holds as it stands""")


if __name__ == "__main__":
    main()
