"""Sphinx settings of the site. `make docs` calls Sphinx through ci/docs.py, which prepares the
source folder.
"""

import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "ci"), str(ROOT)]
import docs  # ci/docs.py

settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")

project, author, release = (settings["DEFAULT"][key] for key in ("name", "author", "version"))
html_title = project
copyright = f"{author}, {settings['DEFAULT']['license']}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
suppress_warnings = ["myst.header"]  # `###` right below a title

# notebooks: the stored outputs, nothing is run and nothing fetched
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_render_text_lexer = "none"
myst_enable_extensions = [
    "dollarmath", "amsmath", "deflist", "attrs_block", "attrs_inline", "colon_fence",
]
myst_heading_anchors = 4
myst_dmath_double_inline = True
mathjax_path = "mathjax/tex-svg-full.js"

# docstrings are plain text
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False
viewcode_line_numbers = True

pygments_dark_style = "github-dark"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_search_scorer = str(ROOT / "docs/_static/scorer.js")
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    "A docstring of the project is text with names in backticks; foreign ones are left as they are."
    if name.startswith("reid_repro"):
        lines[:] = [docs.rest(line.strip(), getattr(obj, "__module__", "")) for line in lines]


def without_builtins(app, env) -> None:
    "Names that Python itself defines have no source here to link to."
    getattr(env, "_viewcode_modules", {}).pop("builtins", None)


def setup(app) -> None:
    app.connect("env-updated", without_builtins)
    app.connect("autodoc-process-docstring", plain_docstring)
