"""Writes the report of nbs/6_comparison/11_report.ipynb as a PDF: `make report`."""

import sys
from pathlib import Path

from reid_repro.lab.ledger import read_ledger
from reid_repro.lab.report import Document

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    print(Document(read_ledger(ROOT / "results")).pdf(sys.argv[1]))
