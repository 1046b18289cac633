"""The commands that use saved models: `predict` and `evaluate`."""

from pathlib import Path
from typing import Any

import click
import numpy as np
from sklearn.metrics import confusion_matrix

from fastcifar_jax.analysis.calibration import measure
from fastcifar_jax.cli import console as view
from fastcifar_jax.cli.options import CliContext, json_option, usage_errors, write_json
from fastcifar_jax.data.checks import DataError, as_data_error, read_bounded
from fastcifar_jax.data.image_folder import decode_image
from fastcifar_jax.data.load import hash_of, load_data
from fastcifar_jax.ops import backend
from fastcifar_jax.runs import experiments
from fastcifar_jax.runs.saved_model import SavedModel, load_model

MAX_FILE = 32 << 20  # bytes of an image file
TOP = 3  # classes shown per image
MAX_SHOWN = 20  # classes in a confusion table that fits on a page

recipe_option = click.option(
    "--recipe", "recipe_name", metavar="NAME", help="A recipe with the classes of your own that the model needs."
)
path_argument = click.argument("path", type=click.Path(path_type=Path))


@click.command()
@path_argument
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--resize", is_flag=True, help="Crop and scale images of another size.")
@recipe_option
@json_option
@click.pass_obj
def predict(
    context: CliContext,
    path: Path,
    images: tuple[Path, ...],
    resize: bool,
    recipe_name: str | None,
    json_path: Path | None,
) -> None:
    """Shows the most probable classes of PNG and JPEG images, given the model at PATH that `run --save` wrote."""
    model = _load(context, path, recipe_name)
    with usage_errors():
        pixels = np.stack([read_image(image, model.image_shape, resize) for image in images])
        probabilities = model.predict(pixels)
    table = view.make_table(("image", *(f"class {i}" for i in range(1, 1 + min(TOP, len(model.classes))))))
    for image, row in zip(images, probabilities, strict=True):
        top = np.argsort(-row, kind="stable")[:TOP]
        table.add_row(str(image), *(f"{model.classes[i]} {view.percent(row[i])}" for i in top))
    view.make_console().print(table)
    answer = {"images": list(map(str, images)), "probabilities": probabilities.tolist()}
    write_json(json_path, _about(path, model) | {"classes": model.classes} | answer)


@click.command()
@path_argument
@click.option("--data", "source", metavar="SOURCE", required=True, help="A data set's name or a path.")
@click.option("--limit-test", type=click.IntRange(1), metavar="N", help="Take the first N test images only.")
@recipe_option
@json_option
@click.pass_obj
def evaluate(
    context: CliContext,
    path: Path,
    source: str,
    limit_test: int | None,
    recipe_name: str | None,
    json_path: Path | None,
) -> None:
    """Evaluates the model at PATH, which `run --save` wrote, on the test images of a data set.

    Shows accuracy, cross-entropy (without label smoothing, whatever the training loss), expected calibration error and
    the confusion table.
    """
    model = _load(context, path, recipe_name)
    console = view.make_console()
    with usage_errors():
        dataset, info = load_data(source)
        pixels, labels = (np.asarray(array)[:limit_test] for array in dataset[2:])
        if limit_test and len(labels) < limit_test:
            raise DataError(f"limit_test is {limit_test}; {source} has {len(labels)} test images: give fewer")
        if len(info.classes) > len(model.classes):
            both = f"{len(info.classes)} classes, the model {len(model.classes)}"
            raise DataError(f"{source} has {both}; give other data")
        plain, views = model.logits(pixels)
    measured = {"plain": measure(plain, labels), "tta": measure(views, labels)}
    on_record = hash_of(pixels, labels) == model.test_hash
    confusion = confusion_matrix(labels, views.argmax(-1), labels=range(len(model.classes)))

    recorded = f"test {view.percent(model.test_accuracy)}, TTA {view.percent(model.tta_accuracy)}"
    same = f"{'the same' if on_record else 'other'} test images"
    run = f"{model.recipe.name}, seed {model.seed}"
    console.print(f"{run}; on record: {recorded} ({model.data_source}; {same})")
    if info.classes != model.classes:
        console.print(f"warning: {source} names its classes differently than the model does")
    table = view.make_table((f"{len(labels):,} images",), tuple(measured["plain"]))
    for name, values in measured.items():
        accuracy, *others = values.values()
        table.add_row({"tta": "with TTA"}.get(name, name), view.percent(accuracy), *(f"{x:.4f}" for x in others))
    console.print(table)
    _show_confusion(confusion, model.classes, console)
    counts = {"source": source, "data_hash": info.hash, "test_images": len(labels), "test_images_on_record": on_record}
    confusions = {"classes": model.classes, "confusion": confusion.tolist()}
    write_json(json_path, _about(path, model) | counts | measured | confusions)


def read_image(path: Path, shape: tuple[int, int, int], resize: bool) -> np.ndarray:
    """An untrusted PNG or JPEG file as uint8 `[height, width, 3]`.

    Args:
      path: of the file.
      shape: height, width and channels of the result.
      resize: crop the centre of an image of another size and scale it; apply the orientation that the file states.

    Raises:
      DataError: the file is too large, damaged, not an image, or of another size than `shape`.
    """
    height, width, channels = shape
    if channels != 3:
        raise DataError(f"the model takes images of {channels} channels; files have 3: use SavedModel.predict")
    with as_data_error(path):
        data, advice = read_bounded(path, MAX_FILE), "resize it, or give --resize"
        return decode_image(data, path, height, width, resize=resize, advice=advice)


def _load(context: CliContext, path: Path, recipe_name: str | None) -> SavedModel:
    with usage_errors():
        backend.configure()  # before anything asks JAX for a device
        found = experiments.resolve((recipe_name,), context.folder) if recipe_name else []
        if len(found) > 1:
            raise ValueError(f"{recipe_name} declares {len(found)} recipes; give one")
        return load_model(path, found[0].recipe if found else None)


def _about(path: Path, model: SavedModel) -> dict[str, Any]:
    recorded = {"test_accuracy": model.test_accuracy, "tta_accuracy": model.tta_accuracy}
    run = {"experiment": model.recipe.name, "seed": model.seed, "recipe_hash": model.recipe.hash}
    return {"model": str(path), **run, "recorded": recorded}


def _show_confusion(confusion, classes, console) -> None:
    if len(classes) <= MAX_SHOWN:
        console.print("rows: true classes; columns: predicted, with TTA")
        table = view.make_table(("",), classes)
        for name, row in zip(classes, confusion, strict=True):
            table.add_row(name, *map(str, row))
    else:
        console.print(f"the {MAX_SHOWN} most frequent confusions, with TTA (all: --json)")
        table = view.make_table(("true", "predicted"), ("images",))
        wrong = confusion * (1 - np.eye(len(classes), dtype=int))
        for i in np.argsort(-wrong, axis=None, kind="stable")[:MAX_SHOWN]:
            true, predicted = divmod(int(i), len(classes))
            if wrong[true, predicted]:
                table.add_row(classes[true], classes[predicted], str(wrong[true, predicted]))
    console.print(table)
