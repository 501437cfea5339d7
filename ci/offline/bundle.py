"""What a node without a network needs, in numbered parts: code, notebooks, wheels, data, weights,
and the script that sets it up there.

    make bundle PYTHON=3.12 PART=60M HAVE=torch,torchvision DATA=~/data WEIGHTS=resnet50.safetensors

HAVE names what the node has, so that no wheel is carried for it: package names, files of `pip
freeze` or `pip list` there, or `everything`.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from setup_node import Fault, read_manifest

ROOT = Path(__file__).resolve().parents[2]
CARRIED = (
    "ci", "data_scripts", "nbs", "reid_repro", "results", "settings.ini", "setup.py",
    "pyproject.toml", "README.md", "LICENSE",
)
# of the notebooks' requirements; no run imports them
AT_HOME = {"jupyterlab", "snakemake", "pytorch-metric-learning"}
MACHINES = ("x86_64", "aarch64")  # for which there are wheels of everything
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def size(text: str) -> int:
    "Bytes of 60M, 2G, 500000."
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text.upper())
    if not match or not int(match[1]):
        raise SystemExit(f"PART={text}: give the size of a part such as 60M or 2G")
    return int(match[1]) * UNITS[match[2]]


def requirements() -> list[str]:
    "What a papermill run imports or starts, as settings.ini has it."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    meta = config["DEFAULT"]
    lines = [*meta["requirements"].splitlines(), *meta["notebooks_requirements"].splitlines()]
    lines.append("ipykernel")
    return [
        line.strip()
        for line in lines
        if line.strip() and canonicalize_name(Requirement(line.strip()).name) not in AT_HOME
    ]


# ---------------------------------------------------------------- wheels


def had(text: str) -> dict[str, str]:
    """Name → version (empty where untold) of what the node has: words that are names, or files that
    `pip freeze` or `pip list` wrote.
    """
    found = {}
    for word in filter(None, map(str.strip, text.split(","))):
        path = Path(word).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else [word]
        except (UnicodeDecodeError, OSError) as error:
            raise SystemExit(
                f"HAVE: '{word}' cannot be read ({error}); give what `pip freeze` wrote there"
            ) from None
        for line in lines:
            match = re.match(
                r"([A-Za-z0-9][\w.-]*)(?:\s*==\s*|\s+(?=\d)|\s*@.*|\s*$)([^\s;#]*)", line.strip()
            )
            if match and match[1] != "Package":
                found[canonicalize_name(match[1])] = match[2]
        if not path.is_file() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(==\S+)?", word):
            raise SystemExit(f"HAVE: '{word}' is neither a file nor a package's name")
    return found


def stand_in(name: str, version: str, folder: Path) -> str:
    """An empty wheel in the place of a package that the node has, so that nothing is fetched for
    it; returns its pinned requirement.
    """
    try:
        version = f"{Version(version).public}+had"
    except InvalidVersion:
        raise SystemExit(
            f"HAVE: version '{version}' of {name} is none; give name==1.2.3, or the output of `pip"
            " freeze` there"
        ) from None
    stem = f"{name.replace('-', '_')}-{version}"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": (
            "Wheel-Version: 1.0\nGenerator: bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file, text in texts.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
        wheel.writestr(
            f"{stem}.dist-info/RECORD",
            "".join(f"{stem}.dist-info/{file},,\n" for file in (*texts, "RECORD")),
        )
    return f"{name}=={version}"


def output_of(command: list, what: str) -> str:
    "Standard output of a command; what it complained of becomes the error."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what}:\n{done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def resolve(python: str, machine: str, have: dict[str, str], scratch: Path) -> list[str]:
    """Pinned requirements of all wheels to bring, for another Python than ours if need be; what the
    node has is counted as there.
    """
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not uv:
        raise SystemExit(
            "make bundle needs uv, which resolves for other Pythons than ours: pip install uv"
        )
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines)
    }
    pins.pop("pip", None)  # it must know the node's Python, and may be newer
    (stubs := scratch / "stubs").mkdir()
    known = {
        name: version or pins[name] for name, version in have.items() if version or name in pins
    }
    constraints = [stand_in(name, version, stubs) for name, version in known.items()]
    constraints += [f"{name}=={version}" for name, version in pins.items() if name not in have]
    (scratch / "constraints").write_text("\n".join(constraints))
    (scratch / "needs").write_text("\n".join([*requirements(), "pip"]))
    command = [
        uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:",
        "--find-links", stubs, "-c", scratch / "constraints", "--python", sys.executable,
        "--python-version", python, "--python-platform", f"{machine}-manylinux_2_28",
        scratch / "needs",
    ]
    pinned = output_of(
        command, f"no set of wheels for Python {python} on {machine} fits together"
    ).split("\n")
    return [line.split(";")[0].strip() for line in pinned if "==" in line and "+had" not in line]


def fetch(python: str, machine: str, have: dict[str, str], wheels: Path) -> None:
    "Downloads the wheels that the node lacks into `wheels`."
    with tempfile.TemporaryDirectory() as scratch:
        pinned = resolve(python, machine, have, Path(scratch))
        print(
            f"{len(pinned)} wheels: {', '.join(line.replace('==', ' ') for line in pinned)}",
            flush=True,
        )
        platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)] + [
            f"manylinux2014_{machine}"
        ]
        options = [
            "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version",
            python, "--quiet",
        ]
        command = [
            sys.executable, "-m", "pip", "download", "--disable-pip-version-check",
            *options,
            "--dest", wheels,
            *pinned,
        ]
        output_of(
            [*command, *(word for name in platforms for word in ("--platform", name))],
            "a wheel could not be downloaded",
        )


# ---------------------------------------------------------------- what else is carried


def code() -> dict[str, Path]:
    """Path in the bundle → file, of all code, notebooks and published entries that git tracks or
    would add.
    """
    listed = output_of(
        [
            "git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--",
            *CARRIED,
        ],
        "make bundle needs the git checkout, because every run must know its commit",
    )
    return {
        name: ROOT / name
        for name in sorted(set(listed.split("\0")))
        if name and (ROOT / name).is_file()
    }


def below(folder: Path) -> Iterator[Path]:
    "All files below a folder, through links."
    for top, _, names in os.walk(folder, followlinks=True):
        yield from (Path(top) / name for name in names)


def data_files(data: str) -> tuple[dict[str, Path], list[str]]:
    """Path in the bundle → file of DATA, and the benchmarks in it; every folder with checksums
    (data_scripts write them) is compared first.
    """
    from reid_repro.datasets import find_benchmarks
    from reid_repro.datasets.preparation import compare_sums, file_sums
    from reid_repro.utils.files import spelt_on_disk

    if not data:
        return {}, []
    folder = spelt_on_disk(Path(data).expanduser())
    if folder.is_file():
        raise SystemExit(
            f"DATA={data} is an archive; make a verified folder of it first (python data_scripts/…"
            f" --from {data} --to …)"
        )
    names = find_benchmarks(folder)
    if not names:
        raise SystemExit(
            f"DATA={data} holds no benchmark that can be read; give the folder that data_scripts"
            " wrote to"
        )
    for sums in sorted([*folder.glob("SHA256SUMS"), *folder.glob("*/SHA256SUMS")]):
        compare_sums(file_sums(sums.parent), sums)
    return {
        f"data/{path.relative_to(folder).as_posix()}": path for path in sorted(below(folder))
    }, names


def weight_files(weights: str) -> dict[str, Path]:
    """Path in the bundle → file of WEIGHTS, safetensors files with commas between or a folder of
    them.
    """
    from reid_repro.learning.backbones import read_tensors
    from reid_repro.utils.files import spelt_on_disk

    words = filter(None, map(str.strip, weights.split(",")))
    files = [spelt_on_disk(Path(word).expanduser()) for word in words]
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"WEIGHTS={weights} is a folder without a safetensors file")
    for file in files:
        read_tensors(file)
    return {f"weights/{file.name}": file for file in files}


# ---------------------------------------------------------------- packing


class Parts:
    "A stream that is cut into files of `most` bytes, each with its SHA-256."

    def __init__(self, folder: Path, most: int):
        self.folder, self.most, self.file, self.files = folder, most, None, []

    def write(self, block: bytes) -> int:
        view = memoryview(block)
        while view:
            if self.file is None:
                self.files.append({"name": f"bundle.tar.{len(self.files) + 1:03d}", "bytes": 0})
                self.file = (self.folder / self.files[-1]["name"]).open("xb")
                self.digest = hashlib.sha256()
            piece = view[: self.most - self.files[-1]["bytes"]]
            self.file.write(piece)
            self.digest.update(piece)
            self.files[-1]["bytes"] += len(piece)
            view = view[len(piece):]
            if self.files[-1]["bytes"] == self.most:
                self.close()
        return len(block)

    def close(self) -> None:
        if self.file:
            self.file.close()
            self.files[-1]["sha256"] = self.digest.hexdigest()
            self.file = None


def put(archive: tarfile.TarFile, name: str, file: Path) -> None:
    "One plain file, owned by nobody in particular."
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = file.stat().st_size, int(file.stat().st_mtime), 0o644
    with file.open("rb") as content:
        archive.addfile(info, content)


def pack(
    out: Path, most: int, wheels: Path, python: str, machine: str, have: list[str], data: str = "",
    weights: str = "",
) -> dict:
    """Writes the bundle into the empty folder `out`, with the wheels of a folder; returns its
    manifest.
    """
    from reid_repro.lab.provenance import run_provenance

    commit, files = run_provenance("cpu")["commit"], code()
    photographs, benchmarks = data_files(data)
    files |= photographs | weight_files(weights)
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    checksums = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in code().items()
        if not name.startswith("results/")
    }
    written = {
        "commit.json": json.dumps({"commit": commit, "files": checksums}, indent=1),
        "reid_repro.egg-info/PKG-INFO": (
            f"Metadata-Version: 2.1\nName: reid_repro\nVersion: {config['DEFAULT']['version']}\n"
        ),
    }
    brought, parts = sorted(wheels.glob("*.whl")), Parts(out, most)
    room = sum(path.stat().st_size for path in [*files.values(), *brought])
    # installed beside the wheels
    room += sum(info.file_size for wheel in brought for info in zipfile.ZipFile(wheel).infolist())
    with tempfile.TemporaryDirectory() as scratch, tarfile.open(
        fileobj=parts, mode="w|", format=tarfile.PAX_FORMAT
    ) as archive:
        for name, text in written.items():
            (path := Path(scratch) / Path(name).name).write_text(text, encoding="utf-8")
            put(archive, f"project/{name}", path)
        for name, path in files.items():
            put(archive, f"project/{name}", path)
        for wheel in brought:
            put(archive, f"wheels/{wheel.name}", wheel)
    parts.close()
    script = out / "setup_node.py"
    shutil.copyfile(Path(__file__).with_name("setup_node.py"), script)
    setup = {
        "name": script.name, "bytes": script.stat().st_size,
        "sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
    }
    manifest = {
        "commit": commit, "python": ".".join(python.split(".")[:2]), "machine": machine,
        "room": int(1.1 * room), "files": [*parts.files, setup], "requirements": requirements(),
        "wheels": [wheel.name for wheel in brought], "had": sorted(have), "data": benchmarks,
        "weights": [name.partition("/")[2] for name in files if name.startswith("weights/")],
    }
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (out / "bundle.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def check_out(out: Path) -> None:
    "SystemExit unless `out` is new, or a bundle and nothing else: it will be replaced."
    if not out.exists():
        return
    try:
        files = {"bundle.json", *(file["name"] for file in read_manifest(out)["files"])}
    except Fault as error:
        raise SystemExit(
            f"'{out}' is there and no bundle ({error}); give another OUT, or remove it"
        ) from None
    if others := sorted({path.name for path in out.iterdir()} - files):
        raise SystemExit(
            f"'{out}' holds more than a bundle: {', '.join(others[:5])}; give another OUT, or move"
            " them away"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ours = platform.python_version()
    parser.add_argument(
        "--python", default="", help=f"version of the node's Python (default: ours, {ours})"
    )
    parser.add_argument(
        "--machine", default="", help="kind of the node's processor (default: x86_64)"
    )
    parser.add_argument("--part", default="", help="size of a part, such as 60M (default: 1G)")
    parser.add_argument("--out", default="", help="folder of the bundle (default: dist/bundle)")
    for name in ("have", "data", "weights"):
        parser.add_argument(f"--{name}", default="")
    given = parser.parse_args()
    python, machine = given.python or ours, given.machine or "x86_64"
    out, most = ROOT / Path(given.out or "dist/bundle").expanduser(), size(given.part or "1G")
    if not re.fullmatch(r"3\.\d+(\.\d+)?", python):
        raise SystemExit(f"PYTHON={python}: give the version of the node's Python such as 3.12")
    python = ours if ours.startswith(f"{python}.") else python  # 3.11 alone would mean 3.11.0
    if machine not in {*MACHINES, platform.machine()}:
        raise SystemExit(
            f"MACHINE={machine}: take one of {', '.join(MACHINES)}, as `uname -m` says on the node"
        )
    check_out(out)
    have = {} if given.have == "everything" else had(given.have)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (wheels := partial / "wheels").mkdir(parents=True)
        if given.have != "everything":
            fetch(python, machine, have, wheels)
        kept = list(have) if given.have != "everything" else ["everything"]
        manifest = pack(partial, most, wheels, python, machine, kept, given.data, given.weights)
        shutil.rmtree(wheels)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    total = sum(file["bytes"] for file in manifest["files"]) / 1e6
    print(
        f"{out}: {len(manifest['files']) + 1} files, {total:,.1f} MB, for Python"
        f" {manifest['python']}; commit {manifest['commit']}"
    )
    print("carry all of them to the node; there: python setup_node.py --to folder")


if __name__ == "__main__":
    main()
