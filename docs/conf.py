"""How ``make docs`` builds the documentation: the Markdown files here, and the API out of the docstrings."""

project = "beam_triton"
copyright = "the beam_triton authors, Apache-2.0"
html_title = "beam_triton"
html_theme = "furo"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist"]
# Links to a heading of a page, as GitHub makes them.
myst_heading_anchors = 3

# `Name` in a docstring links to what is documented under that name, and is plain where nothing is.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Defaults as they are written, not as they are represented.
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
