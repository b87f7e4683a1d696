"""The site: `make docs`. Its source is the repository's own Markdown, so that every link also works in a plain viewer.

The front page, docs/README.md, is the one list of the pages: its headings and links become the navigation. Nothing is
fetched: no inventories, fonts or scripts; mathematics is turned into MathML, which browsers draw themselves.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

from gallery import gallery  # noqa: E402

project = "mamba_probe"
html_title = "mamba_probe"
author = copyright = "the authors of mamba_probe"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "navigation",
    "docstrings",
    "command_line",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "docs/README"
include_patterns = ["docs/**", "kernels/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/**.md"]
exclude_patterns = [".*", "docs/_*", "mamba_probe", "analyses", "tests", "build", "dist", "report", "*.egg-info"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
suppress_warnings = ["config.cache"]

html_math_renderer = "mathml"
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # a name in backticks becomes a link where there is something to link to
    ("py:class", r"(?!mamba_probe\.).*"),  # no inventory of another package is fetched
    ("py:class", r"mamba_probe\..*\.([PR]|Into)"),  # type variables
]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 88

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_additional_pages = {"index": "to_front.html"}
templates_path = ["_templates"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

sphinx_gallery_conf = gallery(HERE)
