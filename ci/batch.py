"""The batch layer around papermill: run one job, check the notebooks, list a plan, run what is
missing, print the tables.

The Snakefile calls `run`; the Makefile calls the rest.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reid_repro.lab.results import Table

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list}
TYPES["int or list"] = int, list


def check_parameters(notebook: Path, parameters: dict) -> None:
    """papermill only warns at unknown parameters and takes any type; here both are errors that name
    the parameter.
    """
    from papermill import inspect_notebook

    known = {
        name: info["inferred_type_name"] for name, info in inspect_notebook(str(notebook)).items()
    }
    if not known:
        raise SystemExit(
            f"{notebook}: no cell is tagged 'parameters'; papermill would run the defaults and"
            " report success"
        )
    for name, value in parameters.items():
        if name not in known:
            raise SystemExit(
                f"{notebook}: parameter '{name}' is unknown; known are {', '.join(known)}"
            )
        kind = TYPES.get(known[name])
        if kind is None:
            raise SystemExit(
                f"{notebook}: parameter '{name}' has type {known[name]!r}; annotate it with one of"
                f" {', '.join(TYPES)}"
            )
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise SystemExit(
                f"{notebook}: parameter '{name}' is {value!r}; it must be of type {known[name]}"
            )


class _CellOutput(logging.Filter):
    "Lets through what cells print, not papermill's own remarks."

    def filter(self, record: logging.LogRecord) -> bool:
        remarks = (
            "Executing ", "Ending ", "Input Notebook", "Output Notebook", "<Figure",
            "[IPKernelApp]",
        )
        record.msg, record.args = record.getMessage().rstrip(), ()
        # of the table: `so_far` prints it shorter, and `tables` after all jobs
        titles = (": paper and reproduction", "Toytown (no paper number", ": not run yet")
        table = any(title in record.msg.partition("\n")[0] for title in titles)
        return bool(record.msg) and not record.msg.startswith(remarks) and not table


FAILED = "failed.ipynb"  # a copy for the second attempt of a job of Slurm's
START = 300  # seconds that a kernel has for its first answer: a busy machine is slow
MEMORY = "take a smaller batch_size, or give the job more memory (memory_mb of its profile)"


def one_line(name: str, value: str) -> str:
    "What an error says, in one line, with a remedy where it says none."
    message = " ".join(value.split())
    if len(message) >= 600:
        message = f"{message[:600]} …"
    message = f"{name}: {message}" if message else name
    short = (
        "MemoryError" in name
        or "OutOfMemory" in name
        or any(w in value for w in ("out of memory", "can't allocate memory"))
    )
    return f"{message}; not enough memory: {MEMORY}" if short else message


def errors_in(notebook: Path) -> list[str]:
    "What a notebook's cells raised, each in one line; ValueError or OSError where it is damaged."
    import nbformat

    outputs = [o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", [])]
    return [one_line(o.ename, o.evalue) for o in outputs if o.output_type == "error"]


def failure(notebook: Path) -> str:
    "Why a run has no entry, from what its notebook and Slurm's log hold, in one line."
    from slurm import ending

    if not notebook.exists() or not notebook.stat().st_size:  # Snakemake leaves empty ones
        errors, otherwise = [], "it did not start"
    else:
        try:
            errors, otherwise = errors_in(notebook), "it was stopped; the same call continues it"
        except (ValueError, OSError) as error:  # not of our writing
            return (
                f"its notebook cannot be read ({one_line(type(error).__name__, str(error))}); the"
                " same call runs it again"
            )
    written = notebook.stat().st_mtime if notebook.exists() else 0
    again, ended = ending(notebook, written) or (True, "")
    if ended and again:  # whatever the kernel raised at its end
        return f"{ended}; the same call continues it"
    if errors:
        return errors[0]
    return f"{ended}: {MEMORY}" if "memory" in ended else ended or otherwise


def refuse_second_attempt(notebook: Path) -> None:
    """SystemExit where the attempt before failed by itself: only a time limit, a preemption and a
    lost node pass when it is tried again.

    Snakemake empties the notebook before it repeats a job, so the first attempt left a copy.
    """
    from slurm import ending

    failed = notebook.with_name(FAILED)
    again, why = ending(notebook) or (not failed.is_file(), "")
    if again:
        return
    if failed.is_file():
        failed.replace(notebook)
    raise SystemExit(
        f"{notebook}: the attempt before failed ({why or failure(notebook)}), and would fail again;"
        " it is not repeated"
    )


def mark_dead(notebook: Path, message: str) -> None:
    "Writes into the cell at which the kernel died that it did: the kernel could not."
    import nbformat
    from reid_repro.utils.files import atomic_write

    nb = nbformat.read(notebook, 4)
    begun = [
        cell
        for cell in nb.cells
        if cell.cell_type == "code" and cell.metadata.get("papermill", {}).get("start_time")
    ]
    if begun:
        error = nbformat.v4.new_output(
            "error", ename="DeadKernelError", evalue=message, traceback=[message]
        )
        begun[-1].outputs.append(error)
        with atomic_write(notebook) as part:
            nbformat.write(nb, part)


def _given(notebook: str, parameters: str) -> dict:
    "Parameters from JSON, checked against the notebook's."
    try:
        given = json.loads(parameters)
    except ValueError as error:
        raise SystemExit(f"parameters are no JSON ({error}): {parameters}") from None
    if not isinstance(given, dict):
        raise SystemExit(f"parameters must be a JSON object of names and values, not {parameters}")
    if not (ROOT / notebook).is_file():
        raise SystemExit(f"notebook '{notebook}' does not exist")
    check_parameters(ROOT / notebook, given)
    return given


def _show_cells() -> None:
    "Prints what cells print while papermill executes them."
    printer = logging.StreamHandler(sys.stdout)
    printer.setFormatter(logging.Formatter("%(message)s"))
    printer.addFilter(_CellOutput())
    logger = logging.getLogger("papermill")
    logger.setLevel(logging.INFO)
    logger.addHandler(printer)
    logger.propagate = False


@contextmanager
def kernelspec(folder: Path):
    """While it is open, `python3` names this interpreter: kernels of other environments, which
    JUPYTER_PATH or a home may put first, lack our packages.
    """
    file = folder / "kernels" / "python3" / "kernel.json"
    file.parent.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": start, "display_name": "Python 3", "language": "python"}
    file.write_text(json.dumps(spec), encoding="utf-8")
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (str(folder), before)))
    try:
        yield
    finally:
        os.environ.pop("JUPYTER_PATH")
        if before is not None:
            os.environ["JUPYTER_PATH"] = before


def kernel_death(words: str) -> str:
    "Why a kernel is gone, in nbclient's words and ours: it never answered, or it ended on the way."
    if "before replying" in words or "respond" in words:  # to the first question, kernel_info
        return (
            f"the kernel did not start ({words}); what it said stands above. It is always this"
            f" Python's, whatever kernelspecs there are: see whether `{sys.executable} -m ipykernel"
            " --version` runs"
        )
    return (
        f"the kernel died ({words}), mostly because the system killed it for want of memory:"
        f" {MEMORY}; the same call continues"
    )


def _execute(notebook: str, target: Path, given: dict) -> None:
    "Executes into `target`, whole at every save; SystemExit in one line for a failure."
    import papermill
    from papermill.iorw import LocalHandler, papermill_io
    from reid_repro.utils.files import atomic_write
    from traitlets.config import Config

    class WholeHandler(LocalHandler):
        def write(self, buf: str, path: str) -> None:
            with atomic_write(path, len(buf)) as part:
                part.write_text(buf, encoding="utf-8")

    # papermill writes straight into its output, which a kill cuts off
    papermill_io.register(str(target), WholeHandler())
    output = target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
    with tempfile.TemporaryDirectory() as sockets, kernelspec(Path(sockets)):
        options = {}
        # kernels that start at the same moment may draw the same TCP port; a folder of one's own
        # cannot clash
        if os.name == "posix":
            manager = {"transport": "ipc", "ip": f"{sockets}/kernel"}
            options["config"] = Config(KernelManager=manager)
        try:
            papermill.execute_notebook(
                str(ROOT / notebook), str(target), given, cwd=str(ROOT),
                log_output=True, progress_bar=False, autosave_cell_every=30,
                kernel_name="python3", start_timeout=START, **options,
            )
        except papermill.PapermillExecutionError as error:
            raise SystemExit(
                f"{notebook}: {one_line(error.ename, error.evalue)}\n  the traceback is in {output}"
            ) from None
        except RuntimeError as error:  # nbclient's, when the kernel dies or does not start
            message = kernel_death(str(error))
            mark_dead(target, message)
            raise SystemExit(
                f"{notebook}: {message}\n  the notebook up to there is in {output}"
            ) from None


def run(notebook: str, output: str, page: str, parameters: str, attempt: int = 1) -> None:
    """Executes `notebook` with `parameters` (JSON) into `output` and writes its HTML `page`; a
    failure leaves the traceback in `output`. A second `attempt` is made of what was cut off, not of
    what failed.

    The run's checkpoint stays until its page is written, so that nothing is trained twice whenever
    this is killed.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from reid_repro.utils.files import atomic_write, drop_checkpoints

    given, target = _given(notebook, parameters), ROOT / output
    target.parent.mkdir(parents=True, exist_ok=True)
    if attempt > 1:
        refuse_second_attempt(target)
    for left in (target, target.with_name(FAILED)):
        left.unlink(missing_ok=True)
    os.environ["REID_REPRO_BATCH"] = "1"
    _show_cells()
    try:
        _execute(notebook, target, given)
    except SystemExit:
        if "SLURM_JOB_ID" in os.environ and target.is_file():
            shutil.copyfile(target, target.with_name(FAILED))
        raise
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(target, as_version=4))
    with atomic_write(ROOT / page, len(html)) as part:
        part.write_text(html, encoding="utf-8")
    if given.get("out"):
        drop_checkpoints(ROOT / given["out"])
        print(so_far(ROOT / given["out"]), flush=True)


def so_far(folder: Path) -> str:
    """What the paper of the run in `folder` has reached in this call by now, beside the paper's
    numbers; the Snakefile tells the call's plan by the environment. Whatever is wrong there does
    not undo the run.
    """
    try:
        return f"\n{_so_far(folder)}\n"
    except (ValueError, OSError) as error:
        return f"no table yet: {one_line(type(error).__name__, str(error))}"


def _so_far(folder: Path) -> "Table":
    "As `so_far`, without a word about what is wrong."
    from reid_repro.lab.ledger import PAPERS, read_entry, read_ledger
    from reid_repro.lab.results import Table, comparison_table
    from reid_repro.lab.rows import plan, read_rows

    paper = read_entry(folder / "ledger.json")["paper"]
    call = json.loads(os.environ.get("REID_REPRO_PLAN", "[]"))
    wanted = [job.name for job in plan(*call) if not job.skip] if call else []
    folders = [folder.parents[2] / name for name in wanted if name.startswith(f"{paper}/")]
    there = [other for other in folders if (other / "notebook.html").is_file()]
    ledger = read_ledger(*{*there, folder})
    rows = [row for row in read_rows(paper) if row.name in set(ledger["row"])]
    head = f"{PAPERS[paper]}, {len(there)} of {len(folders)} runs" if folders else PAPERS[paper]
    short = {}
    for name, table in comparison_table(paper, rows, ledger).sections.items():
        if "not run yet" not in name:
            short[f"{head}: {name.rpartition(': ')[2]}"] = table.drop(columns="evidence")
    return Table(short)


def check_cache() -> None:
    """SystemExit with the remedy where Snakemake's cache cannot be written: it would end in its own
    traceback.
    """
    from platformdirs import user_cache_path  # as Snakemake itself finds it

    place = user_cache_path("snakemake", "snakemake")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise SystemExit(
            f"'{place}' cannot be written ({error.strerror}), and Snakemake keeps files there; set"
            " XDG_CACHE_HOME to a folder that can be written"
        ) from None


def unlocked(words: list[str]) -> None:
    """Replaces this process by the command `words`, Snakemake, without the locks that a killed one
    has left.

    Snakemake's locks are files, which outlive it: the next call would stop until somebody unlocks.
    While none of our batches is alive (each holds a lock that dies with it) there is nothing that
    they could protect, except from jobs of Slurm's, which outlive it too: those are looked for.
    """
    from reid_repro.utils.files import try_lock
    from slurm import before

    before(words)
    check_cache()
    try:
        import fcntl
    except ImportError:  # Windows
        os.execvp(words[0], words)
    (ROOT / ".snakemake").mkdir(exist_ok=True)
    file = open(ROOT / ".snakemake" / "batch.lock", "a")
    locked = try_lock(file, ROOT / ".snakemake")
    if locked:
        for left in (ROOT / ".snakemake" / "locks").glob("*.lock"):
            left.unlink()
    if locked is not None:  # None: a file system without locks, where nobody knows who lives
        fcntl.flock(file, fcntl.LOCK_SH)
    os.set_inheritable(file.fileno(), True)
    os.execvp(words[0], words)


def start_of(job, weights: str, start: str = "") -> str:
    """What a job of `rows.plan` begins with, in a few words; ValueError where the weights do not
    serve.
    """
    import estimates
    from reid_repro.lab.configuration import start_words

    if start or job.start:
        return f"from {job.start.rpartition('/')[0] or start}"
    return start_words(estimates.parameters(job) | {"weights": weights})


def show_plan(
    profile: str, only: str, data: str, dataset: str, seeds: int, weights: str = "", start: str = ""
) -> None:
    """Lists every job of a profile: hours and memory, measured or estimated, what it begins with,
    what is skipped and why, what the ledger holds (rank-1 / mAP)."""
    import estimates
    from reid_repro.lab.ledger import read_ledger
    from reid_repro.lab.rows import plan, read_profile

    jobs = plan(profile, only, data, dataset, seeds)
    recipe = read_profile(profile)
    table = estimates.read_costs()
    known = estimates.estimates(
        jobs, read_ledger(), recipe, table, estimates.GPU_RATE if recipe.gpu else None
    )
    if any(e.source == "estimated" for e in known.values()):
        print(estimates.ASSUMED if recipe.gpu else f"{estimates.ASSUMED_CPU} ({table['device']})")
    width = max((len(job.name) for job in jobs), default=0)
    able = 0
    for job in jobs:
        e = known[job.name]
        memory = f"{e.memory_mib / 1024:5.1f} GiB" if e.memory_mib else " " * 9
        state = f"skipped: {job.skip}" if job.skip else "runs"
        score = f"; in the ledger: {e.score}" if e.score else ""
        try:
            begins = start_of(job, weights, start)
        except ValueError as error:
            begins, state = "no weights", f"cannot run: {error}"
        able += state == "runs"
        print(
            f"{job.name:{width}s} {estimates.duration(e.seconds):>8s} {memory}  {e.source:12s} "
            f" start: {begins:13s}  {state}{score}"
        )
    done = sum(bool(known[job.name].score) for job in jobs)
    print(f"{able} of {len(jobs)} jobs can run; the ledger holds {done} of them")
    unit = "GPU" if recipe.gpu else "CPU"
    for what, some in (
        ("all", jobs), ("not in the ledger", [job for job in jobs if not known[job.name].score]),
    ):
        if some:
            print(f"{what}: {'; '.join(estimates.totals(some, known, unit))}")


def _run_by_priority(todo: list, known: dict, left, at_once: int, start_jobs) -> tuple:
    """Runs of `todo` what fits into the time that is `left()`, by priority.

    Returns what is still to do, the jobs that ran and those that failed, and how much longer than
    estimated runs took.
    """
    import estimates

    expected, taken, factor, done, failed = 0.0, 0.0, 1.0, [], []
    while batch := estimates.choose(todo, known, left(), factor, at_once):
        for job in batch:
            about = estimates.duration(known[job.name].seconds * factor)
            print(f"{job.name}: about {about}", flush=True)
        began = time.perf_counter()
        finished = start_jobs(batch)
        todo = [job for job in todo if job not in batch]
        done += finished
        failed += [job for job in batch if job not in finished]
        if len(finished) == len(batch):
            expected += max(known[job.name].seconds for job in batch)
            taken += time.perf_counter() - began
            factor = taken / expected
    return todo, done, failed, factor


def missing(
    profile: str, only: str, data: str, dataset: str, seeds: int, weights: str, pictures: str,
    device: str, runs: str, budget: str, cores: int, processes: int = 1, start: str = "",
) -> None:
    """Runs what the ledger lacks by priority, and starts nothing that would outlive `budget` by its
    estimate.

    Estimates are multiplied by how much longer than estimated the runs of this call took. Each
    round is one call of Snakemake, with as many jobs as have room on `cores` cores. Fails when a
    run failed; what does not fit is told with its time.
    """
    import estimates

    started, seconds = time.perf_counter(), estimates.budget(budget)
    for name, value in (("CORES", cores), ("PROCESSES", processes)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    skipped(profile, only, data, dataset, seeds, weights, pictures, device, runs, start)
    jobs, known, at_once = _estimated(profile, only, data, dataset, seeds, device, runs, cores)
    todo = estimates.by_priority([job for job in jobs if not known[job.name].score], known)
    if not todo:
        print(
            f"nothing is missing: the ledger holds all {len(jobs)} runs that can run under profile"
            f" '{profile}'"
        )
        return
    budgeted = estimates.duration(seconds)
    print(f"{len(todo)} of {len(jobs)} runs are missing; the budget is {budgeted}")
    configuration = {
        "profile": profile, "only": only, "data": data, "dataset": dataset, "seeds": seeds,
        "weights": weights, "pictures": pictures, "device": device, "processes": processes,
        "runs": runs, "start": start,
    }

    def left() -> float:
        return seconds - (time.perf_counter() - started)

    def start_jobs(batch: list) -> list:
        targets = {job.name: f"{runs}/{profile}/{job.name}/ledger.json" for job in batch}
        _snakemake(list(targets.values()), configuration, cores)
        return [job for job in batch if (ROOT / targets[job.name]).is_file()]

    todo, done, failed, factor = _run_by_priority(todo, known, left, at_once, start_jobs)
    spent = estimates.duration(time.perf_counter() - started)
    print(f"{len(done)} runs done in {spent}, {len(todo)} still missing")
    if todo:
        _explain_rest(todo, known, factor, budget, max(left(), 0))
    if failed:
        names = ", ".join(job.name for job in failed)
        raise SystemExit(
            f"FAILED {names}; the tracebacks are in the notebooks below {runs}/{profile}/"
        )


def _estimated(
    profile: str, only: str, data: str, dataset: str, seeds: int, device: str, runs: str, cores: int
) -> tuple:
    "Jobs that can run, the estimate of each, and how many may run at once."
    import estimates
    from reid_repro.lab.costs import matrix_rate
    from reid_repro.lab.ledger import read_ledger
    from reid_repro.learning.recipe import pick_device
    from reid_repro.lab.rows import plan, read_profile

    jobs = [job for job in plan(profile, only, data, dataset, seeds) if not job.skip]
    recipe = read_profile(profile)
    folders = [ROOT / name for name in dict.fromkeys(("results", "runs", runs))]
    ledger = read_ledger(*(folder for folder in folders if folder.is_dir()))
    gpu = recipe.gpu > 0 and pick_device(device or "auto").type == "cuda"
    rate = matrix_rate("cuda", recipe.parameters["precision"]) if gpu else None
    known = estimates.estimates(jobs, ledger, recipe, estimates.read_costs(), rate)
    alone = recipe.threads == "all" or gpu
    return jobs, known, 1 if alone else max(1, cores // recipe.threads)


def _explain_rest(todo: list, known: dict, factor: float, budget: str, left: float) -> None:
    "Why nothing of what is still missing was started."
    import estimates

    cheapest = estimates.cheapest(todo, known, factor)
    if not cheapest:
        print(f"none of these has an estimate, so none was started: {known[todo[0].name].source}")
        return
    job, seconds = cheapest
    print(
        f"none of these fits into what is left of {budget} ({estimates.duration(left)}); the"
        f" cheapest, {job.name}, takes about {estimates.duration(seconds)}"
    )


def _snakemake(targets: list[str], configuration: dict, cores: int) -> None:
    "Makes `targets`; a failed one is missed by its file afterwards."
    import subprocess

    settings = [f"{key}={value}" for key, value in configuration.items()]
    command = [
        sys.executable, "ci/batch.py", "unlocked", "snakemake", "-s", "ci/Snakefile", "--cores",
        str(cores), "--keep-going", "--rerun-incomplete", "--quiet", "rules", "host", "progress",
        "--config",
        *settings,
        "--",
        *targets,
    ]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    }
    subprocess.run(command, cwd=ROOT, env=environment)


def _few(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def check_starts(jobs: list, weights: str, start: str) -> None:
    """Before any job: the weights that each begins with are there, or are fetched now; SystemExit
    naming what cannot be had, once each.
    """
    import estimates
    from reid_repro.lab.configuration import fetch_weights, finished_run

    if start:
        finished_run(start, ROOT)
    missing: dict[str, list[str]] = {}
    for job in jobs:
        if start or job.start:
            continue
        try:
            start_of(job, weights)
            fetch_weights(estimates.parameters(job) | {"weights": weights or "imagenet"})
        except ValueError as error:
            missing.setdefault(str(error), []).append(job.name)
    if missing:
        lines = (f"{_few(names)}: {message}" for message, names in missing.items())
        raise SystemExit("\n".join(lines))


def skipped(
    profile: str, only: str, data: str, dataset: str, seeds: int, weights: str, pictures: str,
    device: str, runs: str, start: str = "",
) -> None:
    """Checks what all jobs share, and prints one line per reason for those that cannot run; fails
    when none can.
    """
    from reid_repro.viewing.pictures import may_show
    from reid_repro.learning.recipe import pick_device
    from reid_repro.lab.rows import plan

    pick_device(device or "auto")
    may_show(pictures or "toytown", "toytown")
    jobs = plan(profile, only, data, dataset, seeds)
    for reason, times in Counter(job.skip for job in jobs if job.skip).items():
        print(f"skipped {times} run(s): {reason}")
    if not any(job.skip is None for job in jobs):
        raise SystemExit(
            f"nothing to run under profile '{profile}'; `make plan` lists the rows and what they"
            " need"
        )
    check_starts([job for job in jobs if not job.skip], weights, start)


def _tables_of(jobs: list, profile: str) -> list:
    "Comparison and pulse of every paper in `jobs`, of these runs alone."
    from reid_repro.lab.compare import pulse_table
    from reid_repro.lab.ledger import read_ledger
    from reid_repro.lab.results import Table, comparison_table
    from reid_repro.lab.rows import read_rows

    ledger = read_ledger()
    ran = {(job.row.paper, job.row.name, job.dataset) for job in jobs}
    ledger = ledger[ledger["profile"] == profile]
    keys = zip(ledger["paper"], ledger["row"], ledger["dataset"])
    ledger = ledger[[key in ran for key in keys]]
    found = []
    for paper in dict.fromkeys(job.row.paper for job in jobs):
        names = {job.row.name for job in jobs if job.row.paper == paper}
        rows = [row for row in read_rows(paper) if row.name in names]
        sections = comparison_table(paper, rows, ledger).sections
        # what these runs say; what failed is told below
        sections = {name: sections[name] for name in sections if "not run yet" not in name}
        found += [Table(sections), pulse_table(ledger, [paper], profile)]
    return [table for table in found if table.sections]


def tables(
    profile: str, only: str, data: str, dataset: str, seeds: int, weights: str, pictures: str,
    device: str, runs: str, start: str = "",
) -> None:
    """Prints, of every paper in the plan, the comparison and whether its mechanism acts, of the
    rows of this call alone; how many others there are; where to look, what failed and why.
    """
    from reid_repro.lab.rows import plan

    jobs = [job for job in plan(profile, only, data, dataset, seeds) if not job.skip]
    for table in _tables_of(jobs, profile):
        print(f"\n{table}")
    others = {job.name for job in plan(profile, "all", data, dataset, seeds) if not job.skip}
    others -= {job.name for job in jobs}
    if others:
        print(f"\n{len(others)} other runs of profile '{profile}' were not asked for: ONLY=all")
    folders = [f"{runs}/{profile}/{job.name}" for job in jobs]
    failed = [folder for folder in folders if not (ROOT / folder / "ledger.json").exists()]
    print(
        f"\n{len(jobs) - len(failed)} of {len(jobs)} runs are done; each folder holds"
        " notebook.ipynb, notebook.html and ledger.json:"
    )
    for folder in folders:
        if folder not in failed:
            print(f"  {folder}/")
    for folder in failed:
        print(f"FAILED {folder}/notebook.ipynb\n  {failure(ROOT / folder / 'notebook.ipynb')}")


def publish(runs: str) -> None:
    "Copies the ledger entries of all finished runs below a folder to results/."
    from reid_repro.utils.files import find_files
    from reid_repro.lab.ledger import publish, read_ledger

    entries = find_files(ROOT / runs, "ledger.json")
    if not entries:
        raise SystemExit(f"RUNS={runs}: no finished run there; `make reproduce` makes some")
    # a damaged one stops before all
    read_ledger(*(entry.parent for entry in entries), *filter(Path.is_dir, [ROOT / "results"]))
    for entry in entries:
        print(publish(entry).relative_to(ROOT))


def check() -> None:
    """Every reproduction notebook keeps the contract: tagged parameters, their names, types and
    order, defaults equal to the smoke profile.
    """
    import nbformat
    from papermill import inspect_notebook
    from reid_repro.lab.rows import CONTRACT, read_profile, read_rows

    faults = []
    for path in sorted((ROOT / "nbs").rglob("2_reproduce.ipynb")):
        name = path.relative_to(ROOT)
        tagged = [
            c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])
        ]
        if len(tagged) != 1:
            faults.append(
                f"{name}: {len(tagged)} cells are tagged 'parameters'; exactly one must be"
            )
            continue
        known = {
            k: (v["inferred_type_name"], v["default"])
            for k, v in inspect_notebook(str(path)).items()
        }
        for key, kind in CONTRACT.items():
            if known.get(key, ("",))[0] != kind.__name__:
                faults.append(f"{name}: parameter '{key}' must exist with type {kind.__name__}")
        papers = [
            p.stem
            for p in sorted((ROOT / "ci" / "rows").glob("*.yaml"))
            if read_rows(p.stem)[0].notebook == str(name)
        ]
        if len(papers) != 1:
            faults.append(
                f"{name}: {len(papers)} files in ci/rows name this notebook; exactly one must"
            )
            continue
        for key, value in read_profile("smoke").of(papers[0]).items():
            # the default is a literal in our own notebook
            if key not in known or eval(known[key][1]) != value:
                faults.append(
                    f"{name}: default of '{key}' is {known.get(key, ('', 'missing'))[1]}, the smoke"
                    f" profile says {value!r}"
                )
    if faults:
        raise SystemExit("\n".join(faults))
    print("reproduction notebooks keep the contract")


def seed_count(text: str) -> int:
    "The number in SEEDS=; ArgumentTypeError with the remedy for anything else."
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"SEEDS={text}: give how many seeds, one whole number: SEEDS=3 runs seeds 0, 1 and 2"
        ) from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help=run.__doc__)
    for name in ("notebook", "output", "page", "parameters"):
        one.add_argument(name)
    one.add_argument("--attempt", type=int, default=1)
    for name, action in (
        ("plan", show_plan), ("skipped", skipped), ("tables", tables), ("missing", missing),
    ):
        several = commands.add_parser(name, help=action.__doc__)
        several.add_argument("--profile", default="smoke")
        several.add_argument("--seeds", type=seed_count, default=0)
        for option in (
            "only", "data", "dataset", "weights", "start",
            *(() if action is show_plan else ("pictures", "device")),
        ):
            several.add_argument(f"--{option}", default="")
        if action is not show_plan:
            several.add_argument("--runs", default="runs")
        if action is missing:
            several.add_argument("--budget", required=True)
            several.add_argument("--cores", type=int, default=os.cpu_count())
            several.add_argument("--processes", type=int, default=1)
        several.set_defaults(action=action)
    commands.add_parser("publish", help=publish.__doc__).add_argument("--runs", default="runs")
    commands.add_parser("check", help=check.__doc__)
    commands.add_parser("unlocked", help=unlocked.__doc__).add_argument(
        "words", nargs=argparse.REMAINDER, metavar="..."
    )
    arguments = vars(parser.parse_args())
    command, action = arguments.pop("command"), arguments.pop("action", None)
    try:
        {"run": run, "check": check, "publish": publish, "unlocked": unlocked}.get(command, action)(
            **arguments
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
