"""Begins the reproduction of another paper: `make new-paper NAME=foo`.

Writes a small method that works, from the equation to the table, to be replaced by the paper's: the
pair of notebooks (executed), the rows, the profiles' entries, the file of reported numbers, tests,
and the name in `ledger.PAPERS`. Everything is made and executed in a copy of the project first; a
failure, or a killed process, leaves the project as it was.
"""

import argparse
import ast
import keyword
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "ci" / "template"
LEDGER = "nbs/B_engine_room/07_ledger.ipynb"
# its parameters begin with what all reproduction notebooks take
IDE = "nbs/4_baselines/ide/2_reproduce.ipynb"
HEADER = "table,row,dataset,protocol,metric,value,own,note\n"
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "checkpoints", "_build", "data", "weights", "__pycache__",
    ".ipynb_checkpoints", ".snakemake", ".pytest_cache", ".ruff_cache", "*.egg-info",
)


def check(name: str, root: Path) -> None:
    "ValueError saying why `name` cannot be a paper's."
    if not name:
        raise ValueError("give the paper a name: make new-paper NAME=foo")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > 20:
        raise ValueError(
            f"NAME={name!r} becomes a module and a folder: a letter first, then a to z, 0 to 9,"
            " single _, at most 20 in all"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ValueError(f"NAME={name} is a word of Python's own; a module cannot be called so")
    from reid_repro.lab.rows import GROUPS

    if name in GROUPS:
        raise ValueError(
            f"NAME={name} is a group of papers in `make reproduce ONLY=…`; take another name"
        )
    taken = [
        f"reid_repro/{name}.py", f"reid_repro/{name}", f"ci/rows/{name}.yaml",
        f"reid_repro/reported/{name}.csv",
    ]
    taken += [
        f"tests/methods/test_{name}.py",
        *(path.relative_to(root).as_posix() for path in root.glob(f"nbs/5_papers/*_{name}")),
    ]
    for path in taken:
        if (root / path).exists():
            raise ValueError(f"NAME={name} is taken: {path} exists; take another name")
    if name in papers(root)[2]:
        raise ValueError(
            f"NAME={name} is taken: it stands in PAPERS in {LEDGER}; take another name"
        )


def folder(name: str, root: Path) -> str:
    "nbs/5_papers/N_name, N the number behind the last paper's."
    numbers = [
        int(path.name.partition("_")[0])
        for path in (root / "nbs/5_papers").glob("[0-9]*_*")
        if path.is_dir()
    ]
    return f"nbs/5_papers/{max(numbers, default=0) + 1}_{name}"


def papers(
    root: Path,
) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode, dict[str, str], ast.Dict]:
    """The ledger's notebook, its cell with PAPERS, and the dictionary itself, as value and as
    syntax.
    """
    notebook = nbformat.read(root / LEDGER, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^PAPERS = \{", cell.source, re.MULTILINE):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAPERS":
                    return notebook, cell, ast.literal_eval(node.value), node.value
    raise ValueError(f"{LEDGER} has no cell with PAPERS = {{…}}; the name of a paper belongs there")


def add_to_ledger(name: str, title: str, root: Path) -> None:
    "The name in PAPERS, behind the last one, as a contributor would type it."
    notebook, cell, _, node = papers(root)
    lines, last = cell.source.splitlines(), node.values[-1]
    line = lines[last.end_lineno - 1]
    cut = len(line.encode()[: last.end_col_offset].decode())
    added = f'{line[:cut]}, "{name}": "{title}"{line[cut:]}'
    if len(added) > 140:
        first = lines[node.lineno - 1]
        added = f'{line[:cut]},\n{" " * (first.index("{") + 1)}"{name}": "{title}"{line[cut:]}'
    lines[last.end_lineno - 1] = added
    cell.source = "\n".join(lines)
    nbformat.write(notebook, root / LEDGER)


def cells(text: str) -> list[nbformat.NotebookNode]:
    """Cells of a Markdown template: fences marked `python` become code (a further word is a tag), a
    line `+++` parts two texts.
    """
    found = []
    for i, part in enumerate(
        re.split(r"^```python(.*)\n((?:.*\n)*?)```$", text, flags=re.MULTILINE)
    ):
        if i % 3 == 0:
            found += [
                new_markdown_cell(piece.strip())
                for piece in re.split(r"^\+\+\+$", part, flags=re.MULTILINE)
                if piece.strip()
            ]
        elif i % 3 == 1:
            tags = part.split()
        else:
            found.append(new_code_cell(part.rstrip("\n"), metadata={"tags": tags} if tags else {}))
    return found


def shared_parameters(name: str, smoke: dict, root: Path) -> str:
    """The lines of IDE's parameters that all methods take, with this method's row, folder and smoke
    settings.
    """
    cell = next(
        c for c in nbformat.read(root / IDE, 4).cells if "parameters" in c.metadata.get("tags", [])
    )
    shared, mark, _ = cell.source.partition("# the method's own")
    if not mark:
        raise ValueError(
            f"{IDE}: the parameters cell has no line '# the method's own', behind which IDE's own"
            " begin"
        )
    shared = re.sub(r"\bide\b", name, shared)
    for key, value in smoke.items():
        told = repr(value).replace("\\", r"\\")
        shared = re.sub(
            rf"^({key}: \w+ = )[^#\n]*?(?=  #|$)", rf"\g<1>{told}", shared, flags=re.MULTILINE
        )
    return shared


def add_to_profile(profile: str, entry: str, root: Path) -> None:
    "The entry at the end of the profile's `papers`."
    path = root / "ci" / "profiles" / f"{profile}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    if "papers:" not in lines:
        raise ValueError(f"{path.name} has no line 'papers:' for the entry of the new paper")
    end = lines.index("papers:") + 1
    while end < len(lines) and lines[end].startswith(" "):
        end += 1
    lines[end:end] = [f"  {line}" for line in entry.splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(name: str, root: Path) -> str:
    """Writes everything but what is exported and executed into the project at `root`; returns the
    notebooks' folder.
    """
    title, place = "".join(word.capitalize() for word in name.split("_")), folder(name, root)

    def named(file: str) -> str:
        text = (TEMPLATE / file).read_text(encoding="utf-8")
        return (
            text.replace("nbs/5_papers/6_newpaper", place)
            .replace("newpaper", name)
            .replace("NewPaper", title)
        )

    entries = yaml.safe_load(named("profiles.yaml"))
    smoke = yaml.safe_load(entries["smoke"])[name]
    row = f"row: str = \"{name}\""
    (root / place).mkdir()
    for file in ("1_derive", "2_reproduce"):
        made = cells(named(f"{file}.md"))
        for cell in made:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = shared_parameters(name, smoke, root) + cell.source
                assert row in cell.source
        metadata = {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        }
        nbformat.write(new_notebook(cells=made, metadata=metadata), root / place / f"{file}.ipynb")
    (root / "ci" / "rows" / f"{name}.yaml").write_text(named("rows.yaml"), encoding="utf-8")
    (root / "reid_repro" / "reported" / f"{name}.csv").write_text(HEADER, encoding="utf-8")
    (root / "tests" / f"test_{name}.py").write_text(named("test_newpaper.py"), encoding="utf-8")
    for profile, entry in entries.items():
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
    commands = [
        ["nbdev-export"], *(["nbdev-test", "--save", "--n-workers", "0", name] for name in made),
    ]
    commands += [["nbdev-clean", "--fname", name] for name in (LEDGER, *made)]
    commands += [[sys.executable, "ci/readme.py"]]  # the reading order of the start page
    for command in commands:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )


def changed(copy: Path, root: Path, place: str, name: str) -> list[str]:
    """Files that the copy has and the project lacks, or that this script changes; nothing else is
    carried back.
    """
    new = [
        f"{place}/1_derive.ipynb", f"{place}/2_reproduce.ipynb", f"reid_repro/{name}.py",
        f"reid_repro/reported/{name}.csv", f"ci/rows/{name}.yaml", f"tests/methods/test_{name}.py",
    ]
    old = [
        LEDGER, "reid_repro/lab/ledger.py", "reid_repro/_modidx.py", "nbs/index.ipynb", "README.md",
    ]
    old += [path.relative_to(root).as_posix() for path in sorted(root.glob("ci/profiles/*.yaml"))]
    return new + [file for file in old if (copy / file).read_bytes() != (root / file).read_bytes()]


def carry(copy: Path, root: Path, files: list[str]) -> None:
    "Copies the files into the project, all or none."
    before = {
        file: (root / file).read_bytes() if (root / file).exists() else None for file in files
    }
    try:
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(copy / file, root / file)
    except BaseException:
        for file, content in before.items():
            if content is None:
                (root / file).unlink(missing_ok=True)
                if not any((root / file).parent.iterdir()):
                    (root / file).parent.rmdir()
            else:
                (root / file).write_bytes(content)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the module, the folder and the rows: a to z, 0 to 9 and _")
    name = parser.parse_args().name
    try:
        check(name, ROOT)
        place = folder(name, ROOT)
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "project"
            shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
            write(name, copy)
            print(
                f"executing {place}/1_derive.ipynb and 2_reproduce.ipynb: about a minute",
                flush=True,
            )
            execute(place, copy)
            files = changed(copy, ROOT, place, name)
            carry(copy, ROOT, files)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"{error}\nnothing was changed") from None
    print("written:", *files, sep="\n  ")
    print(f"""The cell PAPERS of {LEDGER} names the paper now; the library is exported.
Next: replace the method in {place}/1_derive.ipynb by the paper's, equation by equation;
docs/adding_a_paper.md says how.
  make reproduce ONLY={name}    trains its rows on Toytown
  make test                    holds as it stands""")


if __name__ == "__main__":
    main()
