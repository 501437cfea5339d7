"What `nbdev-export` leaves to do is done once, however often it is done."

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "ci"))
from export import finished


@pytest.mark.parametrize(
    "names",
    [
        "[]", "['one']", "['one', 'two']", "[\n    'one', 'two',\n]",
        str([f"a_longer_name_{i}" for i in range(20)]),
    ],
)
def test_a_second_export_changes_nothing(names):
    module = f'"""As it was."""\n\n# %% auto #0\n__all__ = {names}\n\nx = 1\n'
    once = finished(module, "What is in it.\n\nMain entries: `one`.")
    assert finished(once, "What is in it.\n\nMain entries: `one`.") == once
    assert ",," not in once and max(map(len, once.splitlines())) <= 100
    given, made = {}, {}
    exec(module, given)
    exec(once, made)
    assert made["__all__"] == given["__all__"]
