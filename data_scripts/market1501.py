#!/usr/bin/env python
"""Market-1501: 32,668 boxes of 1,501 people under six cameras, recorded in front of a supermarket.

    python data_scripts/market1501.py --from Market-1501-v15.09.15.zip --to ~/data
    python data_scripts/market1501.py --from bounding_box_train.zip --to ~/data --split train-only

Where from: its authors' page, "Market-1501 Dataset" (Liang Zheng, Tsinghua University), which links
to file hosts; there is no plain address to download from. Terms: research only, no redistribution,
no commercial use. Cite Zheng et al., "Scalable Person
Re-identification: A Benchmark", ICCV 2015.

What it does: unpacks beside the target, looks at every file (names, 12,936 / 3,368 / 19,732 images,
people, cameras, decoding), writes
SHA256SUMS and gives the folder its name, Market-1501-v15.09.15. It may be stopped and run again at
any time.
"""

import sys

from reid_repro.datasets.preparation import Layout, main

LAYOUTS = {
    "standard": (
        Layout("market1501", "Market-1501-v15.09.15", "bounding_box_train"),
        # where the hand-drawn boxes are there too
        Layout("market1501-multi-query", "Market-1501-v15.09.15", "gt_bbox"),
    ),
    "train-only": (Layout("market1501-train-only", "Market-1501-v15.09.15", "bounding_box_train"),),
}
MD5 = {"65005ab7d12ec1c44de4eeafe813e68a": "Market-1501-v15.09.15.zip as released"}

if __name__ == "__main__":
    sys.exit(main(__doc__, LAYOUTS, MD5))
