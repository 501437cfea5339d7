#!/usr/bin/env python
"""VIPeR: 632 people, one photograph of 128×48 pixels from each of two cameras.

    python data_scripts/viper.py --from VIPeR.v1.0.zip --to ~/data
    python data_scripts/viper.py --download --to ~/data

Where from: a public address of its authors' university (UC Santa Cruz), which has not always
answered in recent years. Terms: no written licence is known to us; it was released for research.
Cite Gray et al., "Evaluating Appearance Models for Recognition, Reacquisition, and
Tracking", PETS 2007.

What it does: unpacks beside the target, looks at every file (names, 632 + 632 images that form
pairs, decoding), writes SHA256SUMS and gives the folder its name, VIPeR. It may be stopped and run
again at any time; a download continues where it was.
"""

import sys

from reid_repro.datasets.preparation import Layout, main

LAYOUTS = {"standard": (Layout("viper", "VIPeR", "cam_a"),)}
MD5 = {"1c2d9fc1cc800332567a0da25a1ce68c": "VIPeR.v1.0.zip as released"}
URL = "https://users.soe.ucsc.edu/~manduchi/VIPeR.v1.0.zip"

if __name__ == "__main__":
    sys.exit(main(__doc__, LAYOUTS, MD5, URL))
