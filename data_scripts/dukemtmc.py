#!/usr/bin/env python
"""DukeMTMC-reID: 36,411 boxes of 1,812 people under eight cameras, recorded on a university's
campus.

    python data_scripts/dukemtmc.py --from DukeMTMC-reID.zip --to ~/data

Where from: nowhere. The people in it had not been asked, and its authors withdrew it in 2019 for
the sake of their privacy. This script reads a copy that you hold already, offers no download and
names no place; four of the papers report on it, which is why it can be read at all. Terms of the
release: academic research only, CC BY-NC-SA 4.0. Cite Ristani et al., ECCV workshops 2016, and
Zheng et al., ICCV 2017.

What it does: unpacks beside the target, looks at every file (names, 16,522 / 2,228 / 17,661 images,
people, cameras, decoding), writes
SHA256SUMS and gives the folder its name, DukeMTMC-reID. It may be stopped and run again at any
time.
"""

import sys

from reid_repro.datasets.preparation import Layout, main

LAYOUTS = {"standard": (Layout("dukemtmc", "DukeMTMC-reID", "bounding_box_train"),)}

if __name__ == "__main__":
    sys.exit(main(__doc__, LAYOUTS))
