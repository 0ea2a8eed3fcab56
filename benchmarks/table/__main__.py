"""The benchmark table: published, predicted and measured, side by side. `--help` lists options.

    PYTHONPATH=. python -m benchmarks.table --plan

Torch is imported when the options are good, so `--help` answers at once.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table.options import TableOptions, parse_options
from megablocks_utils.processes.entry_point import run_entry_point


def main(argv: Sequence[str]) -> None:
    """Fill the table, and write JSON, Markdown and plot.

    Raises:
        HelpRequested: for `--help` or `-h`.
        UserError: for options that cannot work, or a machine that cannot run the mode.
    """
    options = parse_options(argv)
    from benchmarks.harness.report import say, show
    from benchmarks.table.modes import fill_table

    content = fill_table(options, argv, say)
    text = write_report(content, options)
    show(text)


def write_report(content: dict[str, Any], options: TableOptions) -> str:
    """Write the Markdown table and the plot beside the JSON file, and return the table.

    With `--docs`, the table becomes part of that page too.
    """
    from benchmarks.harness.report import fill_in
    from benchmarks.table.chart import draw_chart
    from benchmarks.table.markdown import write_markdown

    text = write_markdown(content)
    Path(options.output).with_suffix(".md").write_text(text, encoding="utf-8")
    draw_chart(content, Path(options.output).with_suffix(".png"))
    if options.docs:
        page = Path(options.docs)
        filled = fill_in(page.read_text(encoding="utf-8"), {options.mode: text.strip()}, "table")
        page.write_text(filled, encoding="utf-8")
    return text


if __name__ == "__main__":
    run_entry_point(main, sys.argv[1:])
