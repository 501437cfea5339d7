"""What no notebook can say of itself: nothing private is committed, notebooks keep their shape,
arrows point down, metadata agree.

Every file is looked at that git tracks or would add (`git ls-files --cached --others
--exclude-standard`); runs/ is ignored by git.
"""

import ast
import json
import re
import shutil
import subprocess
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml
import export
from architecture import ROOMS, drawing, imported, room_of
from packaging.requirements import Requirement
from slow_tests import reasons

ROOT = Path(__file__).resolve().parents[2]
PAPERS = {path.stem for path in (ROOT / "ci" / "rows").glob("*.yaml")}
# what papers are held against and built over: they may import these, never one another
BASELINES = {"ide", "pcb"}

# pictures that may be committed: of Toytown alone, each named here by its path from the project's
# root
PICTURES: set[str] = {"docs/pair.png"}
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".npy", ".npz",
    ".mat", ".heic", ".avif",
}
# what files begin with, whatever they are called: pictures, and archives that could hold them
MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"RIFF": "WebP", b"II*\0": "TIFF",
    b"MM\0*": "TIFF", b"PK\3\4": "zip", b"\x1f\x8b": "gzip", b"7z\xbc\xaf": "7z", b"BZh": "bzip2",
    b"\xfd7zXZ": "xz", b"\x89HDF": "HDF5", b"\x93NUMPY": "NumPy",
}
# files that must write such a path down, and why
MAY_NAME_PATHS = {
    "tests/lab/test_results.py": "a made-up home folder that a ledger entry must not keep"
}
LOCAL_PATH = re.compile(
    r"(?<![\w.~)}])(?:/(?:tmp|root|work|home|Users|mnt|private)/|[A-Za-z]:\\\\?Users\\)[^\s\"'`,;)<]*"
)


@cache
def tracked() -> tuple[str, ...]:
    "Paths from the project's root of all files that git tracks or would add."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a git checkout ({error})")
    return tuple(
        sorted({name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()})
    )


@cache
def notebooks() -> dict[str, nbformat.NotebookNode]:
    return {
        name: nbformat.read(ROOT / name, as_version=4)
        for name in tracked()
        if name.endswith(".ipynb")
    }


def code(notebook, exported: bool = True) -> list[str]:
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [s for s in sources if exported or not re.match(r"#\|\s*export", s)]


def outputs(notebook) -> list:
    return [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]


def shows_pictures(notebook) -> bool:
    return any(
        kind.startswith("image/") for output in outputs(notebook) for kind in output.get("data", {})
    )


def calls(source: str):
    """(name, call, names of the calls around it) of every call in a cell; IPython's own lines are
    left out.
    """
    plain = "\n".join(
        "pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()
    )

    def walk(node, around):
        if isinstance(node, ast.Call):
            function = node.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            yield name, node, around
            around = (*around, name)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, around)

    yield from walk(ast.parse(plain), ())


def literal(node):
    return node.value if isinstance(node, ast.Constant) else None


# ---------------------------------------------------------------- (a) no picture of a real person


def test_no_photograph_is_committed():
    faults = []
    for name in tracked():
        head = (ROOT / name).read_bytes()[:8]
        kind = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
        if (kind or Path(name).suffix.lower() in IMAGE_SUFFIXES) and name not in PICTURES:
            faults.append(f"{name} ({kind or 'by its name'})")
    assert not faults, (
        f"pictures and archives are not committed: {faults}; a Toytown picture goes into PICTURES"
        " of this test"
    )
    assert (
        set(tracked()) >= PICTURES
    ), f"PICTURES names files that are gone: {PICTURES - set(tracked())}"


def test_no_photograph_hides_in_text():
    """No data URI in text, no attachment in a notebook: pictures are outputs of cells, and those
    are looked at below. HTML that a cell shows (a slider, the start page's drawings) is such an
    output, except in a reproduction, which may have real photographs at hand.
    """
    embedded = re.compile(rb"data:image/[\w.+-]+;base64,[A-Za-z0-9+/]{40}")
    faults = []
    for name in tracked():
        content = (ROOT / name).read_bytes()
        if embedded.search(content) and name.endswith(".ipynb") and "2_reproduce" not in name:
            content = without_shown_html(json.loads(content))
        if embedded.search(content):
            faults.append(name)
    assert not faults
    assert not [
        name
        for name, notebook in notebooks().items()
        if any(cell.get("attachments") for cell in notebook.cells)
    ]


def without_shown_html(notebook: dict) -> bytes:
    "A notebook but for the HTML that its code cells show."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()) if cell["cell_type"] == "code" else ():
            output.get("data", {}).pop("text/html", None)
    return json.dumps(notebook).encode()


def test_html_of_cells_is_the_only_place_of_embedded_pictures():
    picture = "data:image/png;base64," + "A" * 40

    def shown() -> dict:
        return {"output_type": "execute_result", "data": {"text/html": picture}}

    for field, kept in (("outputs", False), ("source", True), ("metadata", True)):
        cell = {"cell_type": "code", "source": "", "outputs": [], "metadata": {}}
        cell[field] = {"outputs": [shown()], "source": picture, "metadata": {"a": picture}}[field]
        assert (picture.encode() in without_shown_html({"cells": [cell]})) == kept
    prose = {"cell_type": "markdown", "source": picture, "outputs": [shown()]}
    assert without_shown_html({"cells": [prose]}).count(picture.encode()) == 2


def test_notebooks_reach_no_photographs_of_people():
    """Outside reproduction notebooks no code can reach a folder of photographs.

    `open_benchmark` is called with the literal "toytown", or inside `fault(…)`, which expects an
    error. The readers of real layouts are called in notebooks that make their folder themselves. No
    folder comes from outside: no data_root, environment or home folder.
    """
    faults = []
    for name, notebook in notebooks().items():
        if name.endswith("2_reproduce.ipynb"):
            continue
        own = "\n".join(code(notebook, exported=False))
        made = "TemporaryDirectory(" in own  # the notebook makes a folder of its own to read
        for source in code(notebook, exported=False):
            for called, call, around in calls(source):
                first = literal(call.args[0]) if call.args else None
                folder = len(call.args) > 1 or any(k.arg in (None, "root") for k in call.keywords)
                if (
                    called == "open_benchmark"
                    and "fault" not in around
                    and (first != "toytown" or (folder and not made))
                ):
                    faults.append(f"{name}: {ast.unparse(call)} may open real data")
                if (
                    called in ("market1501", "cuhk03", "read_market_layout", "list_images")
                    and not made
                ):
                    faults.append(
                        f"{name}: {ast.unparse(call)} reads a folder that the notebook did not make"
                    )
                if called in ("getenv", "expanduser", "home"):
                    faults.append(f"{name}: {ast.unparse(call)} takes a folder from outside")
                rooted = called in ("Explorer", "explore") and (
                    call.args or any(k.arg in (None, "root") for k in call.keywords)
                )
                if rooted and "fault" not in around:
                    faults.append(f"{name}: {ast.unparse(call)} may show real data")
                if (
                    any(k.arg == "data_root" and literal(k.value) != "" for k in call.keywords)
                    and "fault" not in around
                ):
                    faults.append(f"{name}: {ast.unparse(call)} takes a data_root")
        if re.search(r"\bos\.environ\b(?!\[.XDG_CACHE_HOME.\] = )", own):
            faults.append(f"{name}: os.environ may hand in a folder")
    assert not faults, "\n".join(faults)


def parameters(notebook) -> dict:
    "Defaults of the cell tagged `parameters`."
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assignments = [
        node
        for cell in cells
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.AnnAssign)
    ]
    return {node.target.id: ast.literal_eval(node.value) for node in assignments}


@pytest.mark.parametrize(
    "name",
    [
        n.as_posix()
        for n in (p.relative_to(ROOT) for p in sorted(ROOT.glob("nbs/**/2_reproduce.ipynb")))
    ],
)
def test_committed_reproductions_ran_on_toytown(name):
    notebook = nbformat.read(ROOT / name, as_version=4)
    defaults = parameters(notebook)
    told = (defaults.get("dataset"), defaults.get("data_root"), defaults.get("pictures"))
    assert told == ("toytown", "", "toytown"), f"{name}: dataset, data_root, pictures are {told}"
    injected = [
        cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])
    ]
    assert not injected, f"{name} is the output of a papermill run; runs belong to runs/"
    text = "".join(output.get("text", "") for output in outputs(notebook))
    if shows_pictures(notebook):
        assert (
            "· toytown ·" in text
        ), f"{name} shows pictures, but its outputs do not say that the data set is toytown"
    assert not re.search(
        r"· (?!toytown)[a-z0-9-]+ · seed \d+ ·", text
    ), f"{name} was executed on another data set than toytown"


# ---------------------------------------------------------------- (b) no local paths


def readable(name: str) -> str:
    "A file's text; of a notebook its sources and textual outputs, without pictures."
    if name.endswith(".ipynb"):
        parts = [cell.source for cell in notebooks()[name].cells]
        for output in outputs(notebooks()[name]):
            data = {
                kind: value
                for kind, value in output.get("data", {}).items()
                if not kind.startswith("image/")
            }
            parts += [
                json.dumps({**output, "data": data}, ensure_ascii=False, default=str).replace(
                    "\\n", "\n"
                )
            ]
        return "\n".join(parts)
    return (ROOT / name).read_text(encoding="utf-8", errors="ignore")


def test_no_local_path_is_committed():
    faults = [
        f"{name}: {match[0]}"
        for name in tracked()
        if name not in MAY_NAME_PATHS
        for match in LOCAL_PATH.finditer(readable(name))
    ]
    assert not faults, "folders of somebody's machine: " + "; ".join(faults[:20])


# ---------------------------------------------------------------- (c) the shape of notebooks and
# modules


def test_notebooks_open_with_a_title_and_a_claim():
    titles, faults = {}, []
    for name, notebook in notebooks().items():
        match = (
            re.match(r"# (\S.*)\n\n> (\S.*[.?!])\s*$", notebook.cells[0].source)
            if notebook.cells[0].cell_type == "markdown"
            else None
        )
        if not match:
            faults.append(
                f"{name}: the first cell must be '# Title', an empty line, '> one sentence.'"
            )
        elif match[1] in titles:
            faults.append(f"{name}: the title '{match[1]}' is that of {titles[match[1]]}")
        else:
            titles[match[1]] = name
    assert not faults, "\n".join(faults)


def test_notebooks_are_small_and_ran_without_error():
    faults = [
        f"{n}: {(ROOT / n).stat().st_size / 1e6:.1f} MB"
        for n in notebooks()
        if (ROOT / n).stat().st_size > 1.5e6
    ]
    faults += [
        f"{n}: {o.ename}: {o.evalue[:100]}"
        for n, nb in notebooks().items()
        for o in outputs(nb)
        if o.output_type == "error"
    ]
    assert not faults, "\n".join(faults)


def test_what_a_first_reading_can_do_without_stands_apart():
    "A 3_more exports nothing, so that its derivation is whole, and the two lead to each other."
    found = [name for name in notebooks() if name.endswith("/3_more.ipynb")]
    assert found
    for name in found:
        derivation = notebooks()[name.replace("3_more", "1_derive")]
        exporting = [s for s in code(notebooks()[name]) if re.search(r"^#\|\s*(default_)?exp", s)]
        assert not exporting, f"{name} exports {exporting}; export from 1_derive.ipynb"
        for source, target in ((derivation, "3_more"), (notebooks()[name], "1_derive")):
            text = "".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
            assert f"({target}.ipynb" in text, f"{name}: no link to {target}.ipynb"


@cache
def modules() -> dict[str, tuple[str, ast.Module]]:
    "Dotted module name → (its notebook, its syntax tree), for every exported file."
    found = {}
    for name in tracked():
        if (
            name.startswith("reid_repro/")
            and name.endswith(".py")
            and not name.rpartition("/")[2].startswith("_")
        ):
            text = (ROOT / name).read_text(encoding="utf-8")
            origin = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)\.", text)
            found[name.removesuffix(".py").replace("/", ".")] = (
                origin[1] if origin else "", ast.parse(text),
            )
    return found


def test_every_module_has_its_notebook_and_the_other_way_round():
    exports = {}
    for name, notebook in notebooks().items():
        for match in re.finditer(
            r"^#\|\s*default_exp (\S+)", "\n".join(code(notebook)), re.MULTILINE
        ):
            exports.setdefault("reid_repro." + match[1], []).append(name)
    assert exports == {module: [origin] for module, (origin, _) in modules().items()}


# ---------------------------------------------------------------- (d) docstrings


def public(tree: ast.Module) -> list[str]:
    lists = [
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
    ]
    return ast.literal_eval(lists[0]) if lists else []


def test_public_names_are_documented():
    """Classes and functions of `__all__` where they are defined (constants are explained where they
    stand), and every module.
    """
    faults = []
    for module, (_, tree) in modules().items():
        if not ast.get_docstring(tree):
            faults.append(module)
        if not public(tree):
            faults.append(f"{module}.__all__ is missing")
        defined = {
            n.name: n
            for n in tree.body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
        }
        faults += [
            f"{module}.{name}"
            for name in public(tree)
            if name in defined and not ast.get_docstring(defined[name])
        ]
    assert not faults, f"without a docstring: {', '.join(faults)}"


CALLS = ("forward", "__call__")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields):\n((?:    .*\n|\n)+)", re.MULTILINE)
SHAPE = re.compile(r"\((?:\w+|…)(?:, ?[^()]+)*,?\)|scalar")


def sections(text: str) -> dict[str, str]:
    "{Args, Returns, Raises: what stands below}, as `help()` shows them."
    return dict(SECTION.findall(text + "\n"))


def argument_faults(function: ast.FunctionDef, text: str) -> list[str]:
    "Arguments that the docstring of a function of several does not name, and shapes of tensors."
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    arguments = [a for a in arguments if a.arg not in ("self", "cls")]
    listed, faults = sections(text).get("Args", ""), []
    if len(arguments) > 1:
        heads = re.findall(r"^    ([\w, *]+): ", listed, re.MULTILINE)  # "height, width: pixels"
        # one line says it all, if it names them
        named = re.findall(r"\w+", text if "\n" not in text else " ".join(heads))
        faults = [f"no Args for {a.arg}" for a in arguments if a.arg not in named]
    kinds = [ast.unparse(a.annotation) for a in arguments if a.annotation]
    if any("Tensor" in kind and not re.search("Callable|dict", kind) for kind in kinds):
        if not SHAPE.search(listed or text):
            faults.append("no shape of a tensor in Args")
    return faults


def section_faults(function: ast.FunctionDef, text: str) -> list[str]:
    "What a docstring does not say: arguments of a function that has several, shapes, errors."
    faults = argument_faults(function, text)
    if len(text.splitlines()[0]) > 100 and function.name not in CALLS:
        faults.append("a first line of more than 100 columns")
    beside = re.findall(r"^(?:Args|Returns|Raises|Yields): \S", text, re.MULTILINE)
    faults += [f"{head[:-3]} has its text beside it, not below" for head in beside]
    found = sections(text)
    # the first line says what comes back; several tensors or numbers need a word each
    given = ast.unparse(function.returns) if function.returns else "None"
    if "Args" in found and "Returns" not in found:
        shaped = SHAPE.search(text.split("\n\nArgs:")[0])
        if re.match(r"tuple\[(?!.*\.\.\.)", given) or (given.startswith("Tensor") and not shaped):
            faults.append("no Returns")
    raised = {
        re.match(r"\w+", ast.unparse(n.exc))[0]
        for n in ast.walk(function)
        if isinstance(n, ast.Raise) and n.exc
    }
    named = text if "\n" not in text else found.get("Raises", "")
    named += " ValueError" * ("DatasetError" in named)  # is one
    return faults + [f"no Raises for {e}" for e in raised if e[0].isupper() and e not in named]


def without_args(section: re.Match) -> str:
    return "" if section[1] == "Args" else section[0]


def documented():
    """(module, name, function, docstring) of every public function, constructor and method.

    A constructor's docstring is that of its class, which also says what a call gives where `forward`
    or `__call__` has none of its own.
    """
    for module, (_, tree) in modules().items():
        for node in tree.body:
            if getattr(node, "name", "") not in public(tree):
                continue
            for function in node.body if isinstance(node, ast.ClassDef) else [node]:
                if not isinstance(function, ast.FunctionDef):
                    continue
                shown = function.name in ("__init__", "__call__") or function is node
                if shown or not function.name.startswith("_"):
                    owner = node if function.name == "__init__" else function
                    text = ast.get_docstring(owner) or ast.get_docstring(function) or ""
                    if not text and function.name in CALLS:
                        text = " ".join(SECTION.sub(without_args, ast.get_docstring(node)).split())
                    yield module.removeprefix("reid_repro."), node.name, function, text


def test_docstrings_have_sections():
    faults = [
        f"{module}.{name}.{function.name}: {fault}"
        for module, name, function, text in documented()
        for fault in (section_faults(function, text) if text else ["no docstring"])
    ]
    assert not faults, "\n".join(faults)


def test_the_check_of_sections_sees_what_is_missing():
    tree = ast.parse("def f(x: Tensor, k: int) -> Tensor:\n    raise ValueError('k')")
    assert section_faults(tree.body[0], "The first rows (k, d) of x.") == ["no Raises for ValueError"]
    assert section_faults(tree.body[0], "Rows.\n\nArgs:\n    x: tensor.\nRaises: ValueError.") == [
        "no Args for k", "no shape of a tensor in Args", "Raises has its text beside it, not below",
        "no Returns", "no Raises for ValueError",
    ]
    text = "Rows (k, d).\n\nArgs:\n    x, k: (n, d), and how many.\nRaises:\n    ValueError: for k.\n"
    assert section_faults(tree.body[0], text) == []


def test_docstrings_of_papers_name_their_source():
    "Functions, and classes, in their own docstring or that of a method."
    source, told = re.compile(r"Eq\. ?\d|§|[Tt]able \w|[Ff]igure \d|Source: "), {}
    for module, name, _, text in documented():
        if module in PAPERS - BASELINES:
            told[module, name] = told.get((module, name), "") + text
    faults = [".".join(key) for key, text in told.items() if not source.search(text)]
    assert not faults, f"no equation, section, table or figure of the paper: {', '.join(faults)}"


# ---------------------------------------------------------------- (e) arrows point down


# from below; the seven methods are one
ROOM_NAMES = {f"reid_repro.{room}" for room in ROOMS}


def imports_of(module: str, text: str) -> set[str]:
    return imported(module, text, {*modules(), *ROOM_NAMES})


def test_the_way_imports_are_found():
    "A module beside, a name of a room, a module of a room, a module above."
    text = (
        "from .core import Split\nfrom ..evaluation import evaluate\n"
        "from ..learning import losses\nfrom .. import pcb\nimport reid_repro.lab.rows"
    )
    assert imports_of("reid_repro.datasets.viper", text) == {
        "reid_repro.datasets.core", "reid_repro.evaluation", "reid_repro.learning.losses",
        "reid_repro.pcb", "reid_repro.lab.rows",
    }


def sources() -> dict[str, str]:
    return {m: (ROOT / (m.replace(".", "/") + ".py")).read_text("utf-8") for m in modules()}


def test_arrows_between_rooms_point_down():
    faults, floor = [], {room: i for i, room in enumerate(ROOMS)}
    for module, text in sources().items():
        here = room_of(module)
        for other in imports_of(module, text):
            there = room_of(other)
            if floor[there] > floor[here]:
                faults.append(f"{module} imports {other}: from {here} up to {there}")
            if here == there == "methods" and other.removeprefix("reid_repro.") not in BASELINES:
                faults.append(f"{module} imports the paper {other}")
            if other == f"reid_repro.{here}":
                faults.append(f"{module} imports its own room, not the module beside it")
    assert not faults, "\n".join(faults)


def test_no_two_modules_need_each_other():
    needs = {module: imports_of(module, text) & {*modules()} for module, text in sources().items()}
    done = set()
    while ready := [module for module in needs if module not in done and needs[module] <= done]:
        done |= {*ready}
    assert not set(needs) - done, f"these need each other: {sorted(set(needs) - done)}"


def test_the_figure_of_the_rooms_is_what_the_imports_say():
    shown = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    assert shown == drawing(ROOT), "run `make export` and commit docs/rooms.svg"


def test_across_rooms_only_public_names():
    faults = []
    for module, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (
                node.level > 1 or (room_of(module) == "methods" and node.level)
            ):
                faults += [
                    f"{module}: {alias.name} of {node.module}"
                    for alias in node.names
                    if alias.name.startswith("_")
                ]
    assert not faults, "\n".join(faults)


def test_a_room_offers_all_its_public_names():
    """The stubs behind the rooms' lazy imports are what ci/export.py makes of the modules, and each
    name can be had.
    """
    import importlib

    for room in sorted({room_of(module) for module in modules()} - {"methods"}):
        folder = ROOT / "reid_repro" / room
        assert (folder / "__init__.pyi").read_text(encoding="utf-8") == export.stub(
            folder
        ), "run `make export`"
        package = importlib.import_module(f"reid_repro.{room}")
        names = [
            name
            for module, (_, tree) in modules().items()
            if room_of(module) == room
            for name in public(tree)
        ]
        assert sorted(package.__all__) == sorted(names)
        assert all(getattr(package, name) is not None for name in names)
        assert not {*names} & {
            path.stem for path in folder.glob("*.py")
        }, "a name that is also a module's would hide it"


# ---------------------------------------------------------------- (f) metadata


@cache
def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_requirement():
    lines = [
        x
        for x in (ROOT / "ci" / "constraints.txt").read_text().splitlines()
        if x.strip() and not x.startswith("#")
    ]
    odd = [x for x in lines if not re.fullmatch(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*==\d+(?:\.\w+)*", x)]
    assert not odd, f"constraints are names and versions only, not {odd}"
    pins = {plain(x.split("==")[0]): x.split("==")[1] for x in lines}
    assert len(pins) == len(lines), "a package is pinned twice"
    needed = [
        Requirement(x)
        for key in settings()
        if key.endswith("requirements")
        for x in settings()[key].split("\n")
        if x.strip()
    ]
    assert len(needed) > 20 and not any(r.url for r in needed)
    missing = [
        str(r)
        for r in needed
        if plain(r.name) not in pins
        or not r.specifier.contains(pins[plain(r.name)], prereleases=True)
    ]
    assert not missing, f"not pinned, or pinned to a version that settings.ini refuses: {missing}"


def test_papers_about_the_project_agree():
    "Version and licence stand in settings.ini; citation, changelog and licence text say the same."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (
        settings()["version"], settings()["license"],
    )
    assert f"\n## {settings()['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("SEED=3", "SEED= is no option; did you mean SEEDS=?"),
        ("DATASTE=viper", "did you mean DATASET=?"), ("only=ide", "did you mean ONLY=?"),
        ("PROFLE=paper SEEDS=3", "did you mean PROFILE=?"), ("Z=1", "Z= is no option. The options"),
        ("choice=x", "choice= is no option"),
        ("PYTHON=python3 PATH=/bin:/usr/bin BIN=/tmp MAKEFLAGS= http_proxy=x OMP_NUM_THREADS=1", ""),
        ("DATA=a ONLY=b DATASET=c SEEDS=1 WEIGHTS=d START=e PICTURES=none DEVICE=cpu RUNS=f", ""),
        ("PROCESSES=2 BUDGET=2h CORES=3 PAPER=ide NAME=x CLUSTER=slurm PROFILE=smoke", ""),
        ("MACHINE=x86_64 PART=60M HAVE=torch OUT=a ENTRY=b", ""),
    ],
)
def test_a_misspelt_option_of_make_is_told_with_the_nearest(words, told):
    command = ["make", "-n", "-o", "env", "-o", ".venv/.ready", "plan", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(told) and told in done.stderr


def test_slow_tests_are_listed_with_their_reasons(tmp_path):
    file = tmp_path / "test_made.py"
    file.write_text(
        'SLOW = pytest.mark.slow("named")\n'
        'QUICK = pytest.mark.skip("no")\n'
        '@pytest.mark.slow("a batch")\ndef test_one(): ...\n'
        '@pytest.mark.parametrize("n", [1, pytest.param(2, marks=SLOW)])\ndef test_two(n): ...\n'
        '@QUICK\ndef test_three(): ...\n'
    )
    assert list(reasons(file)) == [("test_one", "a batch"), ("test_two", "named")]
    listed = [name for path in sorted((ROOT / "tests").rglob("test_*.py")) for name in reasons(path)]
    assert len(listed) > 15 and all(reason for _, reason in listed)
