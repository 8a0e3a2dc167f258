"""Sphinx: myst-nb reads what build.py wrote, sphinx-book-theme shows it; no other host is asked."""

from importlib.util import find_spec
from pathlib import Path

from nbdev.config import get_config

settings = get_config()

project = title = settings.title
author, copyright = settings.author, settings.copyright
language = "en"
extensions = ["myst_nb", "sphinx_design", "sphinx.ext.githubpages"]

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_url_schemes = {
    **dict.fromkeys(("http", "https", "mailto")),
    "gh": {"url": "https://github.com/{{path}}/issues/{{fragment}}"},  # gh:owner/name#12
}
nb_execution_mode = "off"  # what is shown is what was saved
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, and warnings that name folders of the author's machine
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}

# MathJax 3.2.2, as npm has it, in one file
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg-full.js"
mathjax_path = mathjax.name

html_theme = "sphinx_book_theme"
html_title = settings.title
html_baseurl = f"{settings.doc_host}{settings.doc_baseurl}/"
html_static_path = ["_static", str(mathjax)]
html_css_files = ["book.css"]
html_favicon = "_static/favicon.svg"
html_copy_source = False  # the notebook to run is the one in the repository
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "repository_url": settings.git_url,
    "repository_branch": settings.branch,
    "path_to_docs": Path(settings.nbs_path).name,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "use_repository_button": True,
    "use_download_button": False,
    "navbar_persistent": [],
    "show_toc_level": 3,
}
