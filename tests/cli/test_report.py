"""The command `report`."""

from pathlib import Path

import pytest

from fastcifar_jax.runs import records
from tests.helpers_page import MIXED, Page, record


def test_command(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for new in MIXED:
        path = records.write(new, Path("runs"))
    status, out, err = call("report", "--markdown", "sub/tables.md")
    assert (status, err) == (0, "") and "8 records of 3 arms; page in report.html" in out
    parsed = Page(Path("report.html").read_text(encoding="utf-8"))
    assert len(parsed.named("figure")) == 5 and "airbench96" not in parsed.texts  # declared in the clone
    assert "Each against baseline: cifar10, 50,000 training and 10,000 test images" in parsed.texts
    assert "| `mine` | 3 |" in Path("sub/tables.md").read_text(encoding="utf-8")
    for options, told in (
        (("--against", "final", "--all"), ["Each against final", '<th scope="row">airbench96</th>']),
        (("--against-previous",), ["Each against the arm above it"]),
    ):
        assert call("report", *options, "--out", "other.html")[0] == 0
        assert all(text in Path("other.html").read_text(encoding="utf-8") for text in told)
    status, out, _ = call("report", str(path), "runs", str(path.resolve()), "--out", "two.html")
    assert status == 0 and out.startswith("8 records of 3 arms")
    status, out, _ = call("report", str(path), "--out", "one.html")
    assert status == 0 and out.startswith("1 record of 1 arm;")


@pytest.mark.parametrize(
    "arguments, expected, told",
    [
        ((), 2, "no records in runs; give the folder"),
        (("nowhere",), 2, "'nowhere' does not exist"),
        (("damaged",), 2, "is not a record of a run"),
        (("good", "--markdown", "report.html"), 2, "--out and --markdown are both report.html"),
        (("good", "--against", "fina"), 2, "--against fina is not an arm of these records; choose one of final"),
        (("good", "--out", "good"), 2, "'good' is a directory"),
        (("good", "--out", "good/final/file.html/x"), 0, ""),
        (("good", "--out", "file/x.html"), 1, "cannot write file/x.html"),
    ],
)
def test_command_refuses_and_leaves_nothing(tmp_path, monkeypatch, call, arguments, expected, told):
    monkeypatch.chdir(tmp_path)
    records.write(record(), Path("good"))
    Path("damaged/final").mkdir(parents=True)
    Path("damaged/final/x.json").write_text("{}")
    Path("file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    status, _, err = call("report", *arguments)
    assert status == expected and told in err
    assert (sorted(tmp_path.rglob("*")) == before) == bool(expected)
