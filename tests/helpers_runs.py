"""Commands that train trick.py for six epochs with checkpoints, and what they leave."""

from pathlib import Path

from tests.helpers_records import without_times

ARGUMENTS = ("run", "trick.py", "--data", "tiny.npz", "--checkpoint")


def raises(error):
    """An action for `at_epoch`."""

    def action():
        raise error

    return action


def records_of(out="runs"):
    """The finished runs on record, but for times and commands, by the names of their files."""
    return {path.name: without_times(path) for path in sorted(Path(out).rglob("*.json"))}


def leftovers(out="runs"):
    return [path.name for path in Path(out).rglob("*") if path.suffix in (".checkpoint", ".tmp")]
