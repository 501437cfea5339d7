#!/usr/bin/env python
"""Renders Toytown, the embedded set of drawn pedestrians, into a new folder with Market-1501's
layout and names.

    python data_scripts/toytown.py --to data/toytown
    python data_scripts/toytown.py --to data/toytown-small --identities 30 --images 4 --seed 7

Nothing is downloaded. Without this script the same set is rendered into the user's cache when it is
first needed.
"""

import argparse
import time

from reid_repro.toytown import SEED, render


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--to", required=True, metavar="FOLDER", help="a new folder (or an empty one)"
    )
    parser.add_argument(
        "--identities", type=int, default=300, metavar="N",
        help="people, two thirds of them for training (300)",
    )
    parser.add_argument(
        "--images", type=int, default=10, metavar="N", help="pictures of each person (10)"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, metavar="N", help=f"another seed, another town ({SEED})"
    )
    given = parser.parse_args()
    start = time.perf_counter()
    try:
        root = render(
            given.to, identities=given.identities, images_per_identity=given.images, seed=given.seed
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    train, query, gallery = (
        sum(1 for _ in (root / folder).glob("*.jpg"))
        for folder in ("bounding_box_train", "query", "bounding_box_test")
    )
    print(
        f"toytown: {train + query + gallery:,} images ({train} train, {query} query, {gallery}"
        f" gallery) of {given.identities} people, seed {given.seed}, in"
        f" {time.perf_counter() - start:.1f} s, in {root}"
    )


if __name__ == "__main__":
    main()
