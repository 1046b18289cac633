"""Live logging to TensorBoard; the records do not need it."""

from collections.abc import Callable
from pathlib import Path

from fastcifar_jax.types import EpochInfo

Log = Callable[[str, EpochInfo], None]  # (label of the run, row of its epoch table)


def tensorboard(folder: Path) -> Log:
    """Writes each row of an epoch table as scalars, one TensorBoard run per label.

    Args:
      folder: gets one folder of event files per label.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("--log tensorboard needs tensorboardX; pip install -e '.[tensorboard]'") from error

    def log(label: str, row: EpochInfo) -> None:
        # One writer per epoch, so that an interrupted run leaves nothing open. File names hold only whole seconds.
        place = folder / label.replace("/", "_").replace(":", "_")
        with SummaryWriter(str(place), filename_suffix=f".epoch{row.epoch}") as writer:
            for name, value in row._asdict().items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, row.epoch)

    return log
