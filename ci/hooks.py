"""Hooks of Jupyter and git: notebooks are cleaned when JupyterLab saves them, merged cell by cell,
and trusted after a merge.

The Jupyter part is nbdev's. Its git part calls tools by name: where they are not on PATH, git keeps
one side of a merge and says nothing. Ours names them by their absolute path, in this checkout's own
configuration, and merges as text, loudly, where they are gone.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent
# $1 ours, $2 base, $3 theirs, $4 the notebook's path
MERGE = """#!/bin/sh
if [ -x {merge} ]; then exec {merge} "$2" "$1" "$3" "$4"; fi
echo "$4: {merge} is not there, so this notebook is merged as text; run make env and make hooks" >&2
exec git merge-file -L ours -L base -L theirs "$1" "$2" "$3"
"""
TRUST = """#!/bin/sh
[ -x {trust} ] && exec {trust}
echo "{trust} is not there, so merged notebooks are not trusted; run make env and make hooks" >&2
"""


def git(*words: str, may_fail: bool = False) -> str:
    "What git prints in this checkout; SystemExit with its words where it fails."
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def write_script(file: Path, text: str, **tools: str) -> None:
    "A shell script with the absolute paths of tools."
    quoted = {key: shlex.quote(str(TOOLS / name)) for key, name in tools.items()}
    file.write_text(text.format(**quoted), encoding="utf-8", newline="\n")
    file.chmod(0o755)


def main() -> None:
    merge = ROOT / git("rev-parse", "--git-common-dir") / "merge-notebooks"
    write_script(merge, MERGE, merge="nbdev-merge")
    after = ROOT / git("rev-parse", "--git-path", "hooks/post-merge")
    after.parent.mkdir(parents=True, exist_ok=True)
    if after.exists() and "nbdev-trust" not in after.read_text(encoding="utf-8"):
        print(f"{after} is a hook of your own and stays; have it call {TOOLS / 'nbdev-trust'}")
    else:
        write_script(after, TRUST, trust="nbdev-trust")
    for section in ("merge.jupyternotebook", "diff.jupyternotebook"):
        git("config", "--local", "--remove-section", section, may_fail=True)
    if git("config", "--local", "include.path", may_fail=True) == "../.gitconfig":  # nbdev's own
        git("config", "--local", "--unset", "include.path")
    driver = f"{shlex.quote(str(merge))} %A %O %B %P"
    git("config", "--local", "merge.jupyternotebook.name", "cell by cell, by nbdev")
    git("config", "--local", "merge.jupyternotebook.driver", driver)
    shown = shlex.quote(str(TOOLS / "nbdev-diff-driver"))
    git("config", "--local", "diff.jupyternotebook.command", shown)
    with tempfile.TemporaryDirectory() as outside:  # of any checkout nbdev sees to Jupyter alone
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(Path(outside).parent)}
        command = [TOOLS / "nbdev-install-hooks"]
        done = subprocess.run(
            command, cwd=outside, env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"nbdev-install-hooks failed: {done.stderr.strip()}")
    print(f"hooks are installed: git's in {merge.parent}, Jupyter's in {Path.home() / '.jupyter'}")


if __name__ == "__main__":
    main()
