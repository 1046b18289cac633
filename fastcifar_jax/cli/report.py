"""The command `report`: a page of records."""

from pathlib import Path

import click

from fastcifar_jax.cli.options import CliContext, usage_errors
from fastcifar_jax.report import html as page
from fastcifar_jax.report import tables
from fastcifar_jax.report.text import counted
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
@click.option("--against", metavar="ARM", help="The arm to compare with; by default the first of each data set.")
@click.option("--against-previous", is_flag=True, help="Compare each arm with the one above it instead.")
@click.option("--all", "show_all", is_flag=True, help="Also list the experiments that were not run.")
@click.pass_obj
def report_command(
    context: CliContext,
    runs: tuple[Path, ...],
    out: Path,
    markdown_path: Path | None,
    against: str | None,
    against_previous: bool,
    show_all: bool,
) -> None:
    """Makes one HTML page of records, without script or network access.

    RUNS are folders of records, as given to `run --out`, or single records; by default the folder runs.
    """
    with usage_errors():
        found = list(records.gather(runs or (Path("runs"),)).values())
    try:
        experiments = discover.find_experiments(context.folder)
    except ValueError:  # outside a clone
        experiments = []
    if markdown_path and markdown_path.resolve() == out.resolve():
        raise click.UsageError(f"--out and --markdown are both {out}; give two files")
    arms = tables.arms_of(found, experiments)
    names = [arm.name for arm in arms]
    if against is not None and against not in names:
        raise click.UsageError(f"--against {against} is not an arm of these records; choose one of {', '.join(names)}")
    differences = tables.differences(arms, against, against_previous)
    ladder = tables.ladder(arms, experiments, show_all)
    files.write_text(out, page.html(arms, ladder, differences))
    click.echo(f"{counted(len(found), 'record')} of {counted(len(arms), 'arm')}; page in {out}")
    if markdown_path:
        shown = [*ladder, *differences, *tables.run_tables(arms)]
        files.write_text(markdown_path, tables.markdown(shown))
        click.echo(f"tables in {markdown_path}")
