"""Weights of finished runs, without what only training needs, listed with their hashes; `make
checkpoints` calls it.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--only", default="", help="rows, as for make reproduce")
    parser.add_argument(
        "--out", default="results/checkpoints", help="folder for the weights and their list"
    )
    given = parser.parse_args()
    from reid_repro.learning.checkpoints import list_weights
    from reid_repro.lab.methods import slim
    from reid_repro.lab.rows import plan

    try:
        jobs = [job for job in plan(given.profile, given.only) if not job.skip]
        files = [ROOT / given.runs / given.profile / job.name / "model.safetensors" for job in jobs]
        absent = [
            f"{given.profile}/{job.name}" for job, file in zip(jobs, files) if not file.is_file()
        ]
        if absent:
            raise SystemExit(
                f"no weights in {given.runs} of {', '.join(absent)}; these runs have not finished,"
                " or train no network"
            )
        for file in files:
            written = slim(file, ROOT / given.out)
            print(f"{written.name}  {written.stat().st_size / 2**20:.1f} MiB")
        print(f"listed in {given.out}/{list_weights(ROOT / given.out).name}")
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
