"""Lists the tests that `make test` leaves out, each with its reason: `python ci/slow_tests.py`.

Those marked `slow(reason)` take more than twenty seconds; `make test-all` runs them.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def reasons(file: Path) -> Iterator[tuple[str, str]]:
    "(name of the test, reason) of every mark `slow` in a file of tests."
    tree = ast.parse(file.read_text(encoding="utf-8"))
    marks = {}  # of names that stand for a mark: SLOW = pytest.mark.slow("…")
    for node in tree.body:
        if isinstance(node, ast.Assign) and (found := _marks(node.value)):
            marks |= {target.id: found for target in node.targets if isinstance(target, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for part in node.decorator_list:
                named = [
                    reason
                    for name in ast.walk(part)
                    if isinstance(name, ast.Name)
                    for reason in marks.get(name.id, ())
                ]
                for reason in dict.fromkeys([*_marks(part), *named]):
                    yield node.name, reason


def _marks(node: ast.AST) -> list[str]:
    "The reasons of the marks `slow` within an expression."
    return [
        call.args[0].value
        for call in ast.walk(node)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "slow"
        and isinstance(call.args[0], ast.Constant)
    ]


if __name__ == "__main__":
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, reason in reasons(file):
            print(f"{file.relative_to(ROOT).as_posix()}::{name}: {reason}")
