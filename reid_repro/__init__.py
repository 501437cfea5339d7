"""Five person re-identification papers, derived equation by equation and reproduced.

The names that most programs need can be imported from here: the seven methods (`IDE`, `PCB`,
`MINet`, `DCC`, `CASN`, `IANet`, `CAN`, and IANet's block `IABlock`), benchmarks (`open_benchmark`,
`load_images`), training (`Recipe`, `train`, `embed`), scores (`distance_matrix`, `evaluate`,
`rerank`) and trained networks (`from_checkpoint`). A module is loaded when a name of it is first
asked for: `import reid_repro` alone costs nothing. Everything else lives in the rooms
`reid_repro.toytown`, `datasets`, `evaluation`, `learning`, `viewing`, `lab`.
"""

import lazy_loader

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str):
    if name == "__version__":
        return _version()
    return _public(name)


def _version() -> str:
    "The installed package's version; on a checkout that is not installed, that of settings.ini."
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version("reid_repro")
    except PackageNotFoundError:
        settings = Path(__file__).resolve().parents[1] / "settings.ini"
        lines = settings.read_text(encoding="utf-8").splitlines() if settings.is_file() else []
        found = [line.partition("=")[2].strip() for line in lines if line.startswith("version")]
        return found[0] if found else "unknown"
