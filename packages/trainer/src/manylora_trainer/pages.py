"""Self-contained HTML pages: no script, nothing loaded from elsewhere, light and dark."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from manylora_trainer.dotted import rounded, written
from manylora_trainer.durable import write_file


def write_page(path: Path, template: str, **context: Any) -> None:
    """Renders a template into the file `path`. What data and models wrote is escaped."""
    environment = Environment(
        loader=PackageLoader("manylora_trainer"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(f"{template}.html.jinja").render(
        number=_number, shown=rounded, written=written, **context
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # A half of a surrogate, which JSON can name, has no form in UTF-8.
    write_file(path, text.encode(errors="backslashreplace"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
