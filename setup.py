"""Package metadata comes from settings.ini alone; this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]


def requirements(key: str) -> list[str]:
    return [line.strip() for line in meta[key].splitlines() if line.strip()]


EXTRAS = ("notebooks", "docs", "cluster", "export", "dev")
extras = {name: requirements(f"{name}_requirements") for name in EXTRAS}
extras["dev"] = [requirement for name in EXTRAS for requirement in extras[name]]
setup(
    name=meta["name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=meta["author"],
    license=meta["license"],
    keywords=meta["keywords"],
    python_requires=f">={meta['min_python']}",
    packages=find_packages(include=["reid_repro", "reid_repro.*"]),
    package_data={"reid_repro": ["reported/*.csv", "py.typed", "__init__.pyi", "*/__init__.pyi"]},
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": ["reid_repro = reid_repro.__main__:main"]},
)
