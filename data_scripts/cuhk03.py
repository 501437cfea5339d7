#!/usr/bin/env python
"""CUHK03: 1,467 people from five pairs of cameras on a campus, boxes drawn by hand (labelled) and
found by a detector (detected).

    python data_scripts/cuhk03.py --from cuhk03-np.zip --to ~/data          # the new protocol's
    folder: detected, labeled or both python data_scripts/cuhk03.py --from cuhk03_release.zip --to
    ~/data     # the original release, or cuhk-03.mat out of it

Where from: its authors send the release on request (The Chinese University of Hong Kong); the new
protocol's folder comes from the authors of "Re-ranking Person Re-identification with k-reciprocal
Encoding". Terms: research only, with care for the privacy of the students shown.
Cite Li et al., "DeepReID", CVPR 2014, and for the new protocol Zhong et al., CVPR 2017.

What it does: unpacks beside the target, turns cuhk-03.mat into images_detected, images_labeled and
testsets.csv (the twenty published test sets), looks at every file (names, image counts, people,
views, decoding), writes SHA256SUMS and gives the folder its name: cuhk03-np for the new protocol,
cuhk03 for the release. It may be stopped and run again at any time.
"""

import sys
from pathlib import Path

from reid_repro.datasets.cuhk03_release import unpack_mat
from reid_repro.datasets.preparation import Layout, main

LAYOUTS = {
    "standard": (
        Layout("cuhk03-np-detected", "cuhk03-np", "detected/bounding_box_train"),
        Layout("cuhk03-np-labelled", "cuhk03-np", "labeled/bounding_box_train"),
        Layout("cuhk03-classic-detected", "cuhk03", "images_detected"),
        Layout("cuhk03-classic-labelled", "cuhk03", "images_labeled"),
    )
}
MD5 = {"728939e58ad9f0ff53e521857dd8fb43": "cuhk03_release.zip as released"}


def convert(content: Path) -> None:
    "Where the original release was unpacked, its photographs."
    for mat in sorted(content.rglob("cuhk-03.mat"))[:1]:
        unpack_mat(mat, content / "cuhk03")


if __name__ == "__main__":
    sys.exit(main(__doc__, LAYOUTS, MD5, convert=convert))
