"""Set up templates of pages that load nothing and run no script."""

from pathlib import Path

import jinja2


def templates(folder: Path) -> jinja2.Environment:
    """Templates in ``folder``; each includes ``page.css``, the look that all our pages share."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
