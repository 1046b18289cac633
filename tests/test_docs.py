"""The documentation: links lead somewhere, Python runs, commands exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from fastcifar_jax.cli.app import commands
from fastcifar_jax.report import tables
from fastcifar_jax.runs import experiments as discover
from fastcifar_jax.runs import records

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def slugs(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue  # there may be no network
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in slugs(file), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_ones_that_exist(page):
    """Every `python -m experiments ...` of a page is parsed: an option that is gone would mislead."""
    for line in "".join(fenced(page, "bash")).splitlines():
        _, found, rest = line.partition("python -m experiments ")
        if not found:
            continue
        name, *arguments = shlex.split(rest.split("#")[0])
        command = commands.get_command(None, name)
        assert command is not None, line
        try:
            command.make_context(name, [arg for arg in arguments if "*" not in arg or "/" not in arg], obj=None)
        except click.UsageError as error:
            # A record that a shell's pattern stands for is not there; all else must be known.
            assert isinstance(error, click.MissingParameter) or "does not exist" in str(error), f"{line}: {error}"


@pytest.mark.slow
def test_python_of_the_api_page_runs(capsys):
    namespace = {}
    for block in fenced(ROOT / "docs" / "api.md", "python"):
        exec(compile(block, "docs/api.md", "exec"), namespace)
    rows = namespace["snapshot"].epochs
    assert rows[-1].test_accuracy > 0.5
    assert int(namespace["state"].step) == 22 * len(rows) + 8
    assert 0 < namespace["totals"].loss < 8 * 64 * rows[0].train_loss
    lines = [f"epoch {row.epoch}: test accuracy {row.test_accuracy:.2%}" for row in rows]
    assert capsys.readouterr().out.splitlines() == lines


def made_tables():
    """Tables of the pages that `report` made, after `<!-- report RUNS [OPTIONS] -->`."""
    pattern = r"^<!-- report ([^\n]*) -->\n\n((?:\|[^\n]*\n)+)"
    return [
        pytest.param(arguments, table, id=f"{page.name}-{arguments.split()[0]}")
        for page in PAGES
        for arguments, table in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


@pytest.mark.parametrize("arguments, table", made_tables())
def test_measured_tables_are_what_report_makes_of_the_records(arguments, table, monkeypatch):
    monkeypatch.chdir(ROOT)
    expanded = []
    for argument in shlex.split(arguments):  # patterns as a shell would
        expanded += sorted(map(str, Path().glob(argument))) if "*" in argument else [argument]
    asked = commands.get_command(None, "report").make_context("report", expanded).params
    experiments = discover.find_experiments(ROOT / "experiments")
    arms = tables.arms_of(list(records.gather(asked["runs"]).values()), experiments)
    differences = tables.differences(arms, asked["against"], asked["against_previous"])
    made = [tables.markdown([one]).partition("\n\n")[2] for one in (*tables.ladder(arms, experiments), *differences)]
    assert table in made


def test_effects_of_tricks_are_those_of_the_tables():
    listed, results = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tricks.md", "results.md"))
    effects = re.findall(r"[+-]\d+\.\d\d \([+-]\d[^)]*\)", listed)
    assert len(effects) == 20  # of the arms of experiments/transfer.py
    assert [effect for effect in effects if f" {effect} |" not in results] == []
