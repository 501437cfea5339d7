#!/usr/bin/env python
"""Sets up reid_repro on a node without a network from a bundle (`make bundle`), and runs rows
there. Needs nothing but Python.

    python setup_node.py --to folder  # where the parts lie: verify, unpack, install, check
    python folder/setup_node.py run ide/ide pcb/pcb --profile paper  # runs, one after the other

What ran lies in folder/home: executed notebooks, pages and ledger entries. Carry it back; `make
publish RUNS=home` takes it.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECK = """
import importlib, pkgutil, sys
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement
for need in map(Requirement, sys.argv[1:]):
    try:
        found = version(need.name)
    except PackageNotFoundError:
        sys.exit(f"{need.name} is neither in the bundle nor on this node; leave it out of HAVE")
    if not need.specifier.contains(found, prereleases=True):
        sys.exit(f"this node has {need.name} {found}, needed is {need}; "
                 "leave it out of HAVE, so that the bundle brings it")
import papermill, nbconvert, ipykernel, reid_repro
for module in pkgutil.walk_packages(reid_repro.__path__, "reid_repro."):
    importlib.import_module(module.name)
"""


class Fault(Exception):
    "What is wrong, and what to do about it."


def read_manifest(folder: Path) -> dict:
    "bundle.json of a folder; Fault when it is missing or damaged."
    path = folder / "bundle.json"
    if not path.is_file():
        raise Fault(f"bundle.json is not in '{folder}'; it is made with the parts, carry it too")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Fault(f"'{path}' is damaged ({error}); carry it again") from None
    if checksum != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
        raise Fault(f"'{path}' is damaged: its own checksum differs; carry it again")
    return manifest


def check_python(manifest: dict) -> None:
    "Fault unless this is the Python and the kind of machine that the bundle's wheels are for."
    here = f"{sys.version_info.major}.{sys.version_info.minor}", platform.machine()
    if here != (manifest["python"], manifest["machine"]):
        wanted = f"Python {manifest['python']} on {manifest['machine']}"
        raise Fault(
            f"this is Python {here[0]} on {here[1]}, the bundle is for {wanted}; call"
            f" python{manifest['python']}, or make it again with PYTHON={here[0]} MACHINE={here[1]}"
        )


def check_parts(folder: Path, manifest: dict) -> None:
    "Fault naming every file of the bundle that is missing, short or damaged."
    missing = [part["name"] for part in manifest["files"] if not (folder / part["name"]).is_file()]
    if missing:
        raise Fault(
            f"{len(missing)} of {len(manifest['files'])} files are not in '{folder}':"
            f" {', '.join(missing)}; carry them too"
        )
    damaged = []
    for part in manifest["files"]:
        digest = hashlib.sha256()
        with (folder / part["name"]).open("rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                digest.update(block)
        if digest.hexdigest() != part["sha256"]:
            size = (folder / part["name"]).stat().st_size
            damaged.append(
                f"{part['name']} ({size:,} of {part['bytes']:,} bytes)"
                if size != part["bytes"]
                else part["name"]
            )
    if damaged:
        raise Fault(f"damaged, their checksums differ: {', '.join(damaged)}; carry them again")


class Joined:
    "The parts as one stream of bytes."

    def __init__(self, paths: list):
        self.paths, self.file = list(paths), None

    def read(self, size: int) -> bytes:
        block = b""
        while len(block) < size:
            if self.file is None:
                if not self.paths:
                    break
                self.file = open(self.paths.pop(0), "rb")
            piece = self.file.read(size - len(block))
            if not piece:
                self.file.close()
                self.file = None
            block += piece
        return block


def unpack(parts: list, to: Path) -> None:
    "Unpacks the joined parts into `to`: files and folders below it and nothing else, each once."
    with tarfile.open(fileobj=Joined(parts), mode="r|") as archive:
        for member in archive:
            names = member.name.split("/")
            if not member.isreg() or member.name.startswith("/") or {"", ".", ".."} & set(names):
                raise Fault(
                    f"the bundle holds '{member.name}', which is no plain file below its folder;"
                    " make it again"
                )
            target = to.joinpath(*names)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                shutil.copyfileobj(archive.extractfile(member), file, 2**20)


def environment(folder: Path) -> dict:
    """Environment variables under which the node's Python finds the bundle's packages first, and
    everything written stays in `folder`.
    """
    paths = [
        str(folder / "site"), str(folder / "project"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        "JUPYTER_PATH": str(folder / "site" / "share" / "jupyter"),
    }
    return {"XDG_CACHE_HOME": str(folder / "cache"), **os.environ, **variables}


def last_line(done: subprocess.CompletedProcess) -> str:
    "What a command complained of last."
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def install(folder: Path, manifest: dict) -> None:
    """Installs the wheels into folder/site, then looks whether everything that a run imports is
    there in a version that serves.
    """
    wheels = sorted((folder / "wheels").glob("*.whl"))
    (folder / "site").mkdir()
    if wheels:
        pip = next(wheel for wheel in wheels if wheel.name.startswith("pip-"))
        options = [
            "--isolated", "install", "--no-index", "--no-deps", "--no-cache-dir",
            "--disable-pip-version-check", "--quiet",
        ]
        command = [
            sys.executable, pip / "pip",
            *options,
            "--target", folder / "site", *(w for w in wheels if w != pip),
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise Fault(f"the wheels could not be installed: {last_line(done)}")
        shutil.rmtree(folder / "wheels")
    command = [sys.executable, "-c", CHECK, *manifest["requirements"]]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(folder), cwd=folder / "project"
    )
    if done.returncode:
        raise Fault(f"this node lacks something: {last_line(done)}")


def set_up(source: Path, to: Path) -> None:
    """From the parts in `source` to a working folder `to`; whatever fails, nothing stays behind
    under that name.
    """
    manifest = read_manifest(source)
    check_python(manifest)
    if to.exists():
        raise Fault(f"'{to}' is there already; give a new folder, or remove it")
    print(
        f"verifying {len(manifest['files'])} files,"
        f" {sum(part['bytes'] for part in manifest['files']) / 1e6:,.0f} MB",
        flush=True,
    )
    check_parts(source, manifest)
    to.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(to.parent).free
    if free < manifest["room"]:
        needed = f"{manifest['room'] / 1e6:,.0f} MB are needed"
        raise Fault(
            f"'{to.parent}' has {free / 1e6:,.0f} MB left, {needed}; make room or give another --to"
        )
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    try:
        partial.mkdir()
        print("unpacking and installing", flush=True)
        unpack(
            [source / part["name"] for part in manifest["files"] if ".tar." in part["name"]],
            partial,
        )
        install(partial, manifest)
        for name in ("bundle.json", "setup_node.py"):
            shutil.copyfile(source / name, partial / name)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"ready, commit {manifest['commit']}. Run rows with:")
    print(f"  {sys.executable} {to / 'setup_node.py'} run ide/pixels ide/ide --profile smoke")


def chosen_weights(folder: Path, given: str) -> str:
    """The weights of a run: the file or folder named (in the bundle, or a path), the only file that
    was carried, or the folder of several.
    """
    carried = sorted((folder / "project" / "weights").glob("*"))
    if given == "random":
        return given
    if given:
        for path in (folder / "project" / "weights" / given, Path(given).expanduser().absolute()):
            if path.exists():
                return str(path)
        raise Fault(
            f"--weights {given}: no such file, here or in the bundle"
            f" ({', '.join(p.name for p in carried) or 'which has none'})"
        )
    return str(carried[0]) if len(carried) == 1 else str(carried[0].parent) if carried else ""


def parameters(job, given: argparse.Namespace, data: str, weights: str, out: str) -> dict:
    "What papermill is told of a job of `rows.plan`: the same as ci/Snakefile tells it."
    asked = {
        "row": job.row.name, "dataset": job.dataset, "seed": job.seed, "profile": given.profile,
        "pictures": given.pictures, "device": given.device, "out": out,
        "data_root": data if job.dataset != "toytown" else "",
        "weights": weights if job.parameters["backbone"] != "tiny" else "",
        "start_from": f"runs/{given.profile}/{job.start}" if job.start else "",
    }
    if given.steps:
        asked["steps"] = given.steps
    return {**job.parameters, **asked}


def data_folder(folder: Path, given: argparse.Namespace) -> str:
    "The folder of real benchmarks: the one named, the bundle's, or none."
    if given.data:
        return str(Path(given.data).expanduser().absolute())
    carried = folder / "project" / "data"
    return str(carried) if carried.is_dir() else ""


def planned(folder: Path, given: argparse.Namespace, data: str, weights: str) -> list:
    "The jobs that can run; Fault where there are none, or pretrained weights are wanting."
    from reid_repro.lab.rows import plan, read_profile

    if not set(read_profile(given.profile).datasets) - {"toytown"}:
        data = ""
    every = plan(given.profile, ",".join(given.rows), data, given.dataset, given.seeds)
    for reason in dict.fromkeys(job.skip for job in every if job.skip):
        print(f"skipped: {reason}")
    jobs = [job for job in every if not job.skip]
    if not jobs:
        raise Fault(f"nothing to run under profile '{given.profile}'")
    if not weights and any(job.parameters["backbone"] != "tiny" for job in jobs):
        files = sorted((folder / "project" / "weights").glob("*"))
        carried = ", ".join(path.name for path in files) or "none in the bundle"
        raise Fault(
            f"profile '{given.profile}' starts from pretrained weights: name a safetensors file or"
            f" a folder with --weights ({carried})"
        )
    return jobs


def run_job(job, work: Path, target: Path, asked: str, threads: str) -> bool:
    "Runs one job in `work` and copies its notebook, page and entry to `target`; False: it failed."
    work.mkdir(parents=True, exist_ok=True)
    (target / "ledger.json").unlink(missing_ok=True)  # of a run with other parameters
    (work / "parameters.json").write_text(asked, encoding="utf-8")
    pages = [str(work / "notebook.ipynb"), str(work / "notebook.html")]
    done = subprocess.run(
        [sys.executable, "ci/batch.py", "run", job.row.notebook, *pages, asked],
        env={"OMP_NUM_THREADS": threads, **os.environ},
    )
    failed = done.returncode != 0
    # a failure shows its traceback
    for name in ("notebook.ipynb", "notebook.html", *(() if failed else ("ledger.json",))):
        if (work / name).is_file():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(work / name, target / name)
    return not failed


def done_already(work: Path, target: Path, asked: str) -> bool:
    "Whether a job has run with these parameters."
    record = work / "parameters.json"
    if not record.is_file() or not (target / "ledger.json").is_file():
        return False
    return record.read_text(encoding="utf-8") == asked


def run(folder: Path, given: argparse.Namespace) -> int:
    """Runs the chosen rows one after the other and copies notebook, page and ledger entry of each
    into `given.out`; returns the exit status.
    """
    check_python(read_manifest(folder))
    home = Path(given.out).expanduser().absolute()
    data, weights = data_folder(folder, given), chosen_weights(folder, given.weights)
    os.environ.update(environment(folder))
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    os.chdir(folder / "project")
    from reid_repro.lab.rows import read_profile

    jobs = planned(folder, given, data, weights)
    # the cores that are ours
    threads = read_profile(given.profile).threads
    threads = str(len(os.sched_getaffinity(0)) if threads == "all" else threads)
    failed = []
    for number, job in enumerate(jobs, start=1):
        work, target = Path("runs") / given.profile / job.name, home / given.profile / job.name
        asked = json.dumps(parameters(job, given, data, weights, str(work)), sort_keys=True)
        if done_already(work, target, asked):
            print(f"[{number}/{len(jobs)}] {job.name}: done already", flush=True)
            continue
        print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
        if not run_job(job, work, target, asked, threads):
            failed.append(job.name)
    print(
        f"{len(jobs) - len(failed)} of {len(jobs)} runs are done; carry '{home}' home, there: make"
        f" publish RUNS=…/{home.name}"
    )
    for name in failed:
        print(
            f"FAILED {name}: the traceback is in {home / given.profile / name / 'notebook.ipynb'};"
            " the same call continues it"
        )
    return int(bool(failed))


def main(argv: list = None) -> int:  # noqa: RUF013
    """The command line. Up to the check of Python's version the script keeps to what Python 3.6
    reads, so that an old one is told, not lost.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", help="the new folder to set up")
    rows = parser.add_subparsers(dest="command").add_parser(
        "run", help="run rows in a folder that was set up"
    )
    rows.add_argument(
        "rows", nargs="+", help="as ONLY= of make reproduce: ide/ide, pcb, ianet/table4e, …"
    )
    rows.add_argument("--profile", default="smoke")
    rows.add_argument("--seeds", type=int, default=0, help="so many seeds instead of the profile's")
    rows.add_argument(
        "--steps", type=int, default=0, help="stop each training after so many steps (a trial)"
    )
    for name, default, words in (
        ("data", "", "folder of real benchmarks (default: the bundle's)"),
        ("dataset", "", "instead of the rows' own data sets"),
        (
            "weights", "",
            (
                "a safetensors file or a folder of several, of the bundle or not, or random"
                " (default: the bundle's)"
            ),
        ),
        ("device", "auto", "auto, cpu or cuda"), ("pictures", "toytown", "toytown, data or none"),
        (
            "out", str(HERE / "home"),
            "what is to be carried home (default: home, beside this script)",
        ),
    ):
        rows.add_argument(f"--{name}", default=default, help=words)
    given = parser.parse_args(argv)
    if given.command is None and not given.to:
        parser.error("give --to folder, or run with rows")
    try:
        if given.command == "run":
            if not (HERE / "project").is_dir():
                raise Fault(
                    f"'{HERE}' is not set up; first call this script with --to folder, then run the"
                    " one in that folder"
                )
            return run(HERE, given)
        set_up(HERE, Path(given.to).expanduser().absolute())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (Fault, OSError, ValueError, tarfile.TarError) as error:
        print(f"setup_node.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
