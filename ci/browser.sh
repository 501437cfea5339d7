#!/usr/bin/env bash
# A real browser on JupyterLab, the explorer and the built site. Debian's chromium is installed where root may do so; without one, skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
found() { command -v chromium chromium-browser google-chrome >/dev/null; }
if ! found && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "no browser here: installing the system's chromium"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
found || echo "no chromium, and none could be installed: the tests below skip (apt-get install chromium)"
python -m pytest -rs tests/browser.py
