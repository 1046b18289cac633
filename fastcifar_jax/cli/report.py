"""The command that makes a page of records."""

from pathlib import Path

import click

from fastcifar_jax.cli.options import CliContext, usage_errors
from fastcifar_jax.report import html as page
from fastcifar_jax.report import tables
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import files, records


@click.command("report")
@click.argument("runs", metavar="[RUNS...]", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default="report.html", show_default=True,
    help="The HTML page.",
)  # fmt: skip
@click.option(
    "--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Also write the tables as GitHub Markdown.",
)  # fmt: skip
@click.option("--against", metavar="ARM", help="What arms are compared with; by default the first of each data set.")
@click.option("--against-previous", is_flag=True, help="Each arm against the one above it instead.")
@click.pass_obj
def report_command(
    invocation: CliContext,
    runs: tuple[Path, ...],
    out: Path,
    markdown_path: Path | None,
    against: str | None,
    against_previous: bool,
) -> None:
    """Makes one HTML page of records, to be read without network or script.

    RUNS are folders of records, as --out of `run` names them, or single records; by default the folder runs.
    """
    with usage_errors():
        found = list(records.gather(runs or (Path("runs"),)).values())
    try:
        experiments = discover.find_experiments(invocation.folder)
    except ValueError:  # outside a clone
        experiments = []
    if markdown_path and markdown_path.resolve() == out.resolve():
        raise click.UsageError(f"--out and --markdown are both {out}; give two files")
    groups = tables.grouped(found, experiments)
    names = [group.arm.name for group in groups]
    if against is not None and against not in names:
        raise click.UsageError(f"--against {against} is no arm of these records; they are of {', '.join(names)}")
    differences = tables.differences(groups, against, against_previous)
    files.write_text(out, page.html(groups, experiments, differences))
    click.echo(f"{len(found)} records of {len(groups)} arms; page in {out}")
    if markdown_path:
        shown = [*tables.ladder(groups, experiments), *differences, *tables.run_tables(groups)]
        files.write_text(markdown_path, tables.markdown(shown))
        click.echo(f"tables in {markdown_path}")
