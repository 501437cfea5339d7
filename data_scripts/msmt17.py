#!/usr/bin/env python
"""MSMT17: 126,441 boxes of 4,101 people under fifteen cameras, recorded on a campus on four days.

    python data_scripts/msmt17.py --from MSMT17_V1.tar.gz --to ~/data

Where from: its authors send it on request, after an agreement is signed (Peking University, project
"Person Transfer GAN"). V2, with masked faces, is what they give out now; the papers here used V1.
Terms: academic research only. Cite Wei et al., "Person Transfer GAN to
Bridge Domain Gap for Person Re-Identification", CVPR 2018.

What it does: unpacks beside the target, looks at every file (the four lists, 32,621 / 11,659 /
82,161 images, people, cameras, decoding), writes SHA256SUMS and gives the folder its name,
MSMT17_V1 or MSMT17_V2. It may be stopped and run again at any time.
"""

import sys

from reid_repro.datasets.preparation import Layout, main

LAYOUTS = {
    "standard": (
        Layout("msmt17", "MSMT17_V1", "train"), Layout("msmt17", "MSMT17_V2", "mask_train_v2"),
    )
}

if __name__ == "__main__":
    sys.exit(main(__doc__, LAYOUTS))
