"""A bundle for a node without a network: packed, cut, carried, damaged, set up with the network cut
off, run, and carried home.
"""

import ast
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import made
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci" / "offline"))

import bundle
import setup_node

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def call(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, **options
    )


def tiny_wheel(folder: Path) -> Path:
    "A wheel with one module of one line."
    bundle.stand_in("tiny-thing", "1.5", folder)
    (path,) = folder.glob("tiny_thing-*.whl")
    with zipfile.ZipFile(path, "a") as wheel:
        wheel.writestr("tiny_thing.py", "ANSWER = 42\n")
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A bundle for this Python, in parts of 8 MB, that brings pip and one wheel; everything else is
    on the node.
    """
    import ensurepip

    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    top = tmp_path_factory.mktemp("packed")
    (wheels := top / "wheels").mkdir()
    pips = sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"))
    if not pips:
        pytest.skip("this Python has no pip of its own to carry (ensurepip)")
    shutil.copy(pips[0], wheels)
    tiny_wheel(wheels)
    (out := top / "bundle").mkdir()
    bundle.pack(out, 8_000_000, wheels, PYTHON, platform.machine(), ["everything"])
    return out


@pytest.fixture
def carried(packed, tmp_path) -> Path:
    "A copy to damage."
    return Path(shutil.copytree(packed, tmp_path / "carried"))


def changed(folder: Path, **values) -> None:
    "Other values in the manifest, with its checksum made anew."
    manifest = json.loads((folder / "bundle.json").read_text()) | values
    manifest.pop("checksum")
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------- the whole way


@pytest.mark.slow("a whole bundle set up")
def test_a_bundle_sets_up_and_runs_a_row_with_the_network_cut_off_and_its_entry_comes_home(
    packed, tmp_path
):
    cut = ["unshare", "-n"]
    if not shutil.which("unshare") or call(*cut, "true").returncode:
        pytest.skip("this user may not cut off the network (unshare -n)")
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    probe = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    assert "unreachable" in call(*cut, sys.executable, "-c", probe).stderr  # it is cut off indeed
    folder = tmp_path / "node folder"
    done = call(
        *cut,
        sys.executable, packed / "setup_node.py", "--to", folder, env=environment, cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "setup_node.py run" in done.stdout and sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["node folder"]
    assert (folder / "site" / "tiny_thing.py").is_file() and not (folder / "wheels").exists()
    words = ["run", "ide/chance", "--profile", "smoke", "--pictures", "none"]
    done = call(
        *cut, sys.executable, folder / "setup_node.py", *words, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    home = folder / "home" / "smoke" / "ide" / "chance" / "toytown-s0"
    assert sorted(path.name for path in home.iterdir()) == [
        "ledger.json", "notebook.html", "notebook.ipynb",
    ]
    from reid_repro.lab.ledger import read_ledger
    from reid_repro.lab.provenance import _carried, run_provenance

    entry = read_ledger(folder / "home").iloc[0]
    assert (entry.paper, entry.row, entry.commit, entry.versions["reid_repro"]) == (
        "ide", "chance", run_provenance("cpu")["commit"],
        run_provenance("cpu")["versions"]["reid_repro"],
    )
    again = call(
        *cut, sys.executable, folder / "setup_node.py", *words, env=environment, cwd=tmp_path
    )
    assert again.returncode == 0 and "done already" in again.stdout
    with (folder / "project" / "ci" / "profiles" / "smoke.yaml").open("a") as file:
        file.write("# changed on the node\n")
    assert _carried(folder / "project").endswith("-dirty")


def test_papermill_is_told_on_a_node_what_the_snakefile_tells_it(tmp_path):
    from reid_repro.lab.rows import plan

    words = [
        "--config", "profile=smoke", "only=ide,casn", "steps=2", "pictures=none",
        f"runs={tmp_path / 'runs'}",
    ]
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = call(
        "snakemake", "-s", "ci/Snakefile", "--cores", "1", "--nolock", "-n", "-p",
        *words,
        cwd=ROOT, env=environment,
    )
    lines = [line for line in done.stdout.splitlines() if "ci/batch.py run" in line]
    snakefile = [json.loads(line[line.index("'{") + 1 : line.rindex("}'") + 1]) for line in lines]
    given = Namespace(profile="smoke", steps=2, pictures="none", device="auto")
    jobs = plan("smoke", "ide,casn")
    ours = [
        setup_node.parameters(job, given, "", "", f"{tmp_path / 'runs'}/smoke/{job.name}")
        for job in jobs
    ]
    key = lambda told: told["out"]
    assert len(jobs) > 5 and sorted(snakefile, key=key) == sorted(ours, key=key)


# ---------------------------------------------------------------- faults: one message, nothing
# half-set-up


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "bundle.tar.002").unlink(), ["1 of", "bundle.tar.002", "carry them too"]),
        (lambda f: (f / "bundle.json").unlink(), ["bundle.json is not in", "carry it too"]),
        (
            lambda f: os.truncate(f / "bundle.tar.001", 5_000_000),
            ["bundle.tar.001", "of 8,000,000 bytes", "carry them again"],
        ),
        (
            lambda f: flip(f / "bundle.tar.002", 4_000_000),
            ["damaged", "bundle.tar.002", "carry them again"],
        ),
        (lambda f: flip(f / "bundle.json", 12), ["bundle.json' is damaged", "carry it again"]),
        (
            lambda f: (f / "bundle.json").write_text("[]"),
            ["bundle.json' is damaged", "carry it again"],
        ),
        (
            lambda f: changed(f, python="3.8"),
            [f"this is Python {PYTHON}", "for Python 3.8", "PYTHON="],
        ),
        (lambda f: changed(f, machine="pdp11"), ["pdp11", "MACHINE="]),
        (
            lambda f: changed(f, room=10**18),
            ["MB left", "1,000,000,000,000 MB are needed", "make room"],
        ),
        (
            lambda f: changed(f, requirements=["numpy>=99"]),
            ["this node has numpy", "numpy>=99", "leave it out of HAVE"],
        ),
        (
            lambda f: changed(f, requirements=["no-such-thing>=1"]),
            ["no-such-thing is neither", "leave it out of HAVE"],
        ),
    ],
    ids=[
        "missing", "no manifest", "cut off", "byte flipped", "manifest damaged", "no mapping",
        "Python", "machine", "room", "version", "lacking",
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_half_set_up(carried, damage, words, tmp_path):
    damage(carried)
    done = call(sys.executable, carried / "setup_node.py", "--to", tmp_path / "to" / "folder")
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("to/*")) and not list(tmp_path.glob("to/.*"))


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def test_a_disk_that_fills_up_leaves_nothing_behind(packed, tmp_path):
    # no file may grow larger: writing fails in the middle
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    done = call(
        sys.executable, packed / "setup_node.py", "--to", tmp_path / "folder", preexec_fn=full
    )
    assert (
        done.returncode == 1
        and "File too large" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert not list(tmp_path.iterdir())


def test_an_old_python_can_read_the_script_far_enough_to_be_told():
    source = (ROOT / "ci" / "offline" / "setup_node.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 6))
    annotations = [
        ast.unparse(n)
        for f in ast.walk(ast.parse(source))
        if isinstance(f, ast.FunctionDef)
        for n in [f.returns, *(a.annotation for a in f.args.args)]
        if n
    ]
    # evaluated when the script is read
    assert not [text for text in annotations if "|" in text or "[" in text]


def test_a_folder_that_is_there_is_left_alone(packed, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = call(sys.executable, packed / "setup_node.py", "--to", tmp_path)
    assert (
        done.returncode == 1
        and "there already" in done.stderr
        and (tmp_path / "mine.txt").read_text() == "mine"
    )
    unready = call(sys.executable, packed / "setup_node.py", "run", "ide/ide")
    assert unready.returncode == 1 and "not set up" in unready.stderr


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "link", "a//b"])
def test_nothing_is_unpacked_outside_the_folder(tmp_path, name):
    with tarfile.open(tmp_path / "bundle.tar.001", "w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = (
            (tarfile.SYMTYPE, "/") if name == "link" else (tarfile.REGTYPE, "")
        )
        info.size = 0 if name == "link" else 2
        archive.addfile(info, io.BytesIO(b"hi"))
    (to := tmp_path / "to").mkdir()
    with pytest.raises(setup_node.Fault, match="no plain file"):
        setup_node.unpack([tmp_path / "bundle.tar.001"], to)
    assert not list(to.iterdir()) and sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle.tar.001", "to",
    ]


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize(("length", "most"), [(0, 5), (4, 5), (5, 5), (11, 5), (100, 1), (7, 100)])
def test_parts_joined_are_what_was_written(tmp_path, length, most):
    data = bytes(made.random(max(length, 1)).numpy().tobytes()[:length])
    parts = bundle.Parts(tmp_path, most)
    for start in range(0, length, 3):
        parts.write(data[start : start + 3])
    parts.close()
    files = [tmp_path / told["name"] for told in parts.files]
    assert b"".join(file.read_bytes() for file in files) == data and len(files) == -(
        -length // most
    )
    assert all(
        file.stat().st_size == told["bytes"] <= most for file, told in zip(files, parts.files)
    )
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == [
        told["sha256"] for told in parts.files
    ]
    joined = setup_node.Joined(files)
    assert joined.read(4) + joined.read(1000) == data and joined.read(1) == b""


def test_a_bundle_holds_all_code_and_no_more(packed):
    manifest = setup_node.read_manifest(packed)
    stream = setup_node.Joined(
        [packed / told["name"] for told in manifest["files"] if ".tar." in told["name"]]
    )
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        names = {member.name for member in archive}
    assert {
        f"project/{name}"
        for name in (
            "settings.ini", "ci/batch.py", "reid_repro/ide.py", "reid_repro/reported/ianet.csv",
            "nbs/4_baselines/ide/2_reproduce.ipynb", "ci/rows/ide.yaml", "ci/profiles/paper.yaml",
        )
    } <= names
    assert "project/reid_repro/reported/casn.csv" in names and any(
        name.startswith("project/results/") for name in names
    )
    assert not [
        name
        for name in names
        if name.startswith("project/tests") or "__pycache__" in name or "/." in name
    ]


def test_sizes_and_what_a_node_has_are_read_as_they_are_written(tmp_path):
    assert [bundle.size(text) for text in ("60M", "2g", "500", "3KB")] == [
        60_000_000, 2_000_000_000, 500, 3_000,
    ]
    for wrong in ("", "0", "60 parts", "-1M"):
        with pytest.raises(SystemExit, match="PART="):
            bundle.size(wrong)
    (freeze := tmp_path / "freeze.txt").write_text(
        "torch==2.12.0+cu130\nPyYAML==6.0\nmine @ file:///here\n-e git+x#egg=y\n# note\n"
    )
    (listed := tmp_path / "list.txt").write_text(
        "Package Version Editable project\n------- -----\nScikit_Image 0.26.0\nme 1.0 /x\n"
    )
    assert bundle.had(f"{freeze}, {listed},numpy==2.1, h5py") == {
        "torch": "2.12.0+cu130", "pyyaml": "6.0", "mine": "", "scikit-image": "0.26.0", "me": "1.0",
        "numpy": "2.1", "h5py": "",
    }
    (binary := tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match=r"HAVE: '.*binary' cannot be read .*pip freeze"):
        bundle.had(str(binary))
    for wrong in ("no/such/file.txt", "numpy>=2"):
        with pytest.raises(SystemExit, match="neither a file nor"):
            bundle.had(wrong)


@pytest.mark.parametrize("more", ["home/entry.json", "notes.txt"])
def test_only_a_bundle_and_nothing_more_is_replaced(carried, more):
    bundle.check_out(carried)
    bundle.check_out(carried.parent / "new")
    (carried / more).parent.mkdir(exist_ok=True)
    (carried / more).write_text("mine")
    with pytest.raises(
        SystemExit, match=f"holds more than a bundle: {more.split('/')[0]}; give another OUT"
    ):
        bundle.check_out(carried)
    (carried / "bundle.json").write_text("[]")
    with pytest.raises(SystemExit, match="is there and no bundle"):
        bundle.check_out(carried)


def test_a_folder_of_runs_and_an_unknown_machine_stop_the_packing_before_it_begins(
    carried, monkeypatch
):
    monkeypatch.setattr(bundle, "pack", lambda *arguments: pytest.fail("began to pack"))
    (carried / "home").mkdir()
    for words, named in (
        (["--out", str(carried)], "more than a bundle"),
        (["--machine", "toaster"], "MACHINE=toaster: take one of"),
    ):
        monkeypatch.setattr(sys, "argv", ["bundle.py", "--have", "everything", *words])
        with pytest.raises(SystemExit, match=named):
            bundle.main()
    assert (carried / "home").is_dir()


def test_damaged_data_are_not_packed(tmp_path):
    from reid_repro.datasets.preparation import file_sums

    folder = tmp_path / "data"
    made.own(folder)
    (folder / "SHA256SUMS").write_text(
        "".join(f"{digest}  {name}\n" for name, digest in file_sums(folder).items())
    )
    files, names = bundle.data_files(str(folder))
    assert names == ["photographs", "photographs-without-cameras"] and {
        f"data/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()
    } == set(files)
    victim = next(path for path in sorted(folder.rglob("*")) if path.suffix in (".jpg", ".png"))
    victim.write_bytes(made.encoded(victim.suffix, (9, 17)))
    with pytest.raises(ValueError, match="changed"):
        bundle.data_files(str(folder))
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no benchmark"):
        bundle.data_files(str(empty))


# ---------------------------------------------------------------- what a run needs


def closure(lines: list[str]) -> set[str]:
    "Names of the requirements and of all that those require, as installed here."
    found, todo = set(), [Requirement(line) for line in lines]
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            todo += [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
    return found


def test_everything_that_a_run_imports_is_carried_or_had():
    sources = {
        path.name: path.read_text(encoding="utf-8")
        for path in [*(ROOT / "reid_repro").rglob("*.py"), ROOT / "ci" / "batch.py"]
    }
    for path in ROOT.glob("nbs/**/2_reproduce.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources[str(path)] = "\n".join(
            "".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"
        )
    used = set()
    for text in sources.values():
        for node in ast.walk(ast.parse(text)):
            used |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            used |= (
                {node.module or ""}
                if isinstance(node, ast.ImportFrom) and not node.level
                else set()
            )
    ours = {"reid_repro", "", *(path.stem for path in (ROOT / "ci").glob("*.py"))}
    modules = {name.partition(".")[0] for name in used} - set(sys.stdlib_module_names) - ours
    assert {"torch", "skimage", "sklearn", "cv2", "h5py", "papermill", "nbformat"} <= modules
    carried, made_by = closure(bundle.requirements()), packages_distributions()
    missing = {
        module: made_by.get(module)
        for module in modules
        if not carried & {canonicalize_name(d) for d in made_by.get(module, [])}
    }
    # what commands need that no run calls: export, the report as a PDF
    extras = {"onnx", "onnxruntime", "onnxscript", "typst"}
    assert not set(missing) - extras
    assert (
        not carried & {"snakemake", "jupyterlab", "nbdev"} and {"ipykernel", "nbconvert"} <= carried
    )
