"""Every format holds the same images, and what is wrong with a file is said."""

import gzip
import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image

from fastcifar_jax.data import load as data_module
from fastcifar_jax.data.load import DataError, load
from tests.helpers_data import (
    FILES,
    FOLDERS,
    TINY,
    assert_same,
    binary_files,
    names,
    python2_pickle,
    python_files,
    refusal,
    tiny,
    write_folder,
    write_images,
    write_npz,
    write_tar,
)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("where", ["folder", "parent", "tar.gz", "tar"])
def test_cifar_releases(tmp_path, version, classes, where):
    files, folder = FILES[version](TINY[classes], classes), FOLDERS[version, classes]
    if where in ("folder", "parent"):
        path = write_folder(tmp_path / folder, files)
        path = path if where == "folder" else tmp_path
    else:
        path = write_tar(tmp_path / f"cifar.{where}", files, folder)
        if where == "tar":
            path.write_bytes(gzip.decompress(path.read_bytes()))
    got, info = load(str(path))
    assert_same(got, TINY[classes])
    assert info.classes == tuple(names(classes))
    assert (info.source, info.train, info.test) == (str(path), 20, 10)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(tmp_path, protocol):
    got, _ = load(str(write_folder(tmp_path, python_files(TINY[10], protocol=protocol))))
    assert_same(got, TINY[10])


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_of_numpy_1(tmp_path, protocol):
    files = python_files(TINY[10], protocol=protocol)
    # NumPy 2 calls the module numpy._core; an opcode with a length comes before the name from protocol 4 on.
    for new, old in ((b"cnumpy._core.", b"cnumpy.core."), (b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")):
        files = {name: pickled.replace(new, old) for name, pickled in files.items()}
    # Frames name the length of what follows, so take the one of protocol 5 out.
    files = {n: p[:2] + p[11:] if p[2:3] == b"\x95" else p for n, p in files.items()}
    assert b"numpy._core" not in files["test_batch"]
    got, _ = load(str(write_folder(tmp_path, files)))
    assert_same(got, TINY[10])


def test_pickles_of_python_2(tmp_path):
    files = python_files(TINY[10])
    files["test_batch"] = python2_pickle(TINY[10].test_images, TINY[10].test_labels)
    assert pickle.loads(files["test_batch"], encoding="bytes")[b"data"].shape == (10, 3072)
    got, _ = load(str(write_folder(tmp_path, files)))
    assert_same(got, TINY[10])


def test_fortran_order_and_label_arrays(tmp_path):
    changed = tiny(10, 20, 20)
    files = python_files(changed)
    batch = pickle.loads(files["test_batch"])
    batch = {b"data": np.asfortranarray(batch[b"data"]), b"labels": np.array(batch[b"labels"], ">i8")}
    files["test_batch"] = pickle.dumps(batch, 2)
    got, _ = load(str(write_folder(tmp_path / "py", files)))
    assert_same(got, changed)
    npz = write_npz(tmp_path / "a.npz", changed, x_train=np.asfortranarray(changed.train_images))
    assert_same(load(str(npz))[0], changed)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.dtype(">u2")])
def test_npz(tmp_path, column, dtype):
    cast = TINY[10]._replace(
        train_labels=TINY[10].train_labels.astype(dtype), test_labels=TINY[10].test_labels.astype(dtype)
    )
    got, info = load(str(write_npz(tmp_path / "a.npz", cast, column)))
    assert_same(got, TINY[10])
    assert info.classes == tuple("0123456789")


def test_npz_compressed_with_a_thousand_classes(tmp_path):
    wide = tiny(1000)
    fields = ("x_train", "y_train", "x_test", "y_test")
    np.savez_compressed(tmp_path / "a.npz", **dict(zip(fields, wide, strict=True)))
    got, info = load(str(tmp_path / "a.npz"))
    assert_same(got, wide)
    assert len(info.classes) == 1000


def test_image_folders(tmp_path):
    path = write_images(tmp_path, TINY[10])
    (path / "train" / names(10)[0] / ".DS_Store").write_bytes(b"no image")
    got, info = load(str(path))
    assert info.classes == tuple(names(10))

    def content(images, labels):
        return sorted((int(y), x.tobytes()) for x, y in zip(images, labels, strict=True))

    assert content(*got[:2]) == content(*TINY[10][:2])
    assert content(*got[2:]) == content(*TINY[10][2:])
    assert list(got.train_labels) != sorted(got.train_labels)  # the first n images hold several classes
    assert_same(load(str(path))[0], got)


def test_image_folders_convert_to_rgb(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "grey").mkdir(parents=True)
        Image.new("L", (32, 32), 7).save(tmp_path / split / "grey" / "a.jpg", quality=100)
        Image.new("RGBA", (32, 32), (7, 7, 7, 9)).save(tmp_path / split / "grey" / "b.PNG")
    got, _ = load(str(tmp_path))
    assert (got.train_images == 7).all()


def test_digits():
    got, info = load("digits")
    assert (info.train, info.test, info.classes) == (1437, 360, tuple("0123456789"))
    assert got.train_images.shape == (1437, 32, 32, 3)
    assert got.train_images.dtype == np.uint8 and got.train_labels.dtype == np.int32
    assert got.train_images.min() == 0 and got.train_images.max() > 250
    assert np.ptp(np.bincount(got.test_labels)) <= 3  # stratified
    seen = {image.tobytes() for image in got.train_images}
    assert sum(image.tobytes() in seen for image in got.test_images) == 0
    assert load("digits")[1] == info


def test_digits_keep_the_mean_of_each_block():
    from sklearn.datasets import load_digits

    original = np.sort(load_digits().data.sum(axis=1))
    got, _ = load("digits")
    enlarged = np.concatenate([got.train_images, got.test_images])[..., 0].reshape(-1, 1024)
    # Bilinear weights of an inner pixel sum to one: sixteen new pixels, each 255/16 of the old.
    np.testing.assert_allclose(np.sort(enlarged.sum(axis=1)), original * 255, rtol=0.1)


def test_hash_is_of_the_content(tmp_path):
    _, python = load(str(write_folder(tmp_path / "py", python_files(TINY[10]))))
    _, npz = load(str(write_npz(tmp_path / "a.npz", TINY[10])))
    digest = hashlib.sha256(b"".join(array.tobytes() for array in TINY[10]))
    assert python.hash == npz.hash == digest.hexdigest()
    assert load(str(tmp_path / "a.npz"), limit_train=5)[1].hash != npz.hash


def test_environment_names_the_default(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", TINY[10])
    monkeypatch.setenv("FASTCIFAR_DATA", str(path))
    assert_same(load()[0], TINY[10])
    assert load("digits")[1].source == "digits"
    monkeypatch.delenv("FASTCIFAR_DATA")
    monkeypatch.setattr(data_module, "_read_tfds", lambda name: (TINY[10], (name,)))
    assert load()[1].classes == ("cifar10",)


def test_limit_train(tmp_path):
    path = str(write_npz(tmp_path / "a.npz", TINY[10]))
    got, info = load(path, limit_train=7)
    cut = TINY[10]._replace(train_images=TINY[10].train_images[:7], train_labels=TINY[10].train_labels[:7])
    assert_same(got, cut)
    assert (info.train, info.test) == (7, 10)
    assert load(path, limit_train=20)[1].train == 20
    for limit in (0, -1, 21):
        with pytest.raises(DataError, match=f"limit_train is {limit}; .* has 20 training images: give 1 to 20"):
            load(path, limit_train=limit)


# Faults. Each has a message with the file's name and the fault.


@pytest.mark.parametrize("version", ["python", "binary"])
def test_missing_copied_and_ambiguous_batches(tmp_path, version):
    files = FILES[version](TINY[10])
    ending = "" if version == "python" else ".bin"
    without = {name: data for name, data in files.items() if name != f"data_batch_3{ending}"}
    assert f"lacks data_batch_3{ending}" in refusal(write_folder(tmp_path / "missing", without))
    assert f"lacks data_batch_3{ending}" in refusal(write_tar(tmp_path / "a.tar.gz", without))
    copied = files | {f"data_batch_4{ending}": files[f"data_batch_2{ending}"]}
    shorter = files | {f"data_batch_5{ending}": FILES[version](tiny(10, 15))[f"data_batch_5{ending}"]}
    assert f"data_batch_5{ending} holds 3 images, others 4" in refusal(write_folder(tmp_path / "short", shorter))
    assert f"data_batch_4{ending} is a copy of data_batch_2{ending}" in refusal(write_folder(tmp_path / "copy", copied))
    for kind, write in FILES.items():
        write_folder(tmp_path / "two" / FOLDERS[kind, 10], write(TINY[10]))
    assert "more than one data set" in refusal(tmp_path / "two")


def test_a_release_without_names_has_numbered_classes(tmp_path):
    files = python_files(TINY[10])
    del files["batches.meta"]
    assert load(str(write_folder(tmp_path, files)))[1].classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (dict(data=None), "expected 'data' and 'labels'"),
        (dict(labels=None), "expected 'data' and 'labels'"),
        (dict(data=np.zeros((4, 3072), np.float32)), "type 'f4'"),
        (dict(data=np.zeros((4, 3072), np.int8)), "int8 (4, 3072); expected a uint8 array"),
        (dict(data=np.zeros((4, 3071), np.uint8)), "uint8 (4, 3071); expected"),
        (dict(data=np.zeros((4, 32, 32, 3), np.uint8)), "uint8 (4, 32, 32, 3); expected"),
        (dict(data=np.zeros((0, 3072), np.uint8), labels=[]), "no images"),
        (dict(data=[1, 2]), "images as list"),
        (dict(data=print), "asks for 'builtins.print'"),
        (dict(data=np.array([[1, "a"]], object)), "type 'O8'"),
        (dict(labels=[0, 1, 2]), "shape (3,) for 4 images"),
        (dict(labels=[0, 1, 2, -1]), "the label -1; expected 0 to 9"),
        (dict(labels=[0, 1, 2, 10]), "the label 10; expected 0 to 9"),
        (dict(labels=[0, 1, 2, 1 << 80]), "labels of type object"),
        (dict(labels=[0, 1, 2, "3"]), "no list of integers"),
        (dict(labels=[0, 1, 2, 3.0]), "BINFLOAT"),
        (dict(labels=np.zeros((4, 2), np.int64)), "shape (4, 2) for 4 images"),
    ],
)
def test_wrong_batches(tmp_path, change, fault):
    files = python_files(TINY[10])
    files["data_batch_2"] = python_files(TINY[10], protocol=4, **change)["data_batch_2"]
    message = refusal(write_folder(tmp_path, files))
    assert "data_batch_2" in message and fault in message


@pytest.mark.parametrize("value", [10, 255])
def test_wrong_labels_in_a_binary_batch(tmp_path, value):
    files = binary_files(TINY[10])
    files["test_batch.bin"] = bytes([value]) + files["test_batch.bin"][1:]
    assert f"test_batch.bin holds the label {value}" in refusal(write_folder(tmp_path, files))


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_batches(tmp_path, version, share):
    files = FILES[version](TINY[10])
    name = "data_batch_5" if version == "python" else "data_batch_5.bin"
    files[name] = files[name][: int(share * len(files[name]))]
    assert name in refusal(write_folder(tmp_path / "folder", files))
    assert name in refusal(write_tar(tmp_path / "a.tar.gz", files))


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["tar.gz", "tar", "npz"])
def test_truncated_files(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        write_npz(path, TINY[10])
    else:
        write_tar(path, binary_files(TINY[10]))
    content = gzip.decompress(path.read_bytes()) if kind == "tar" else path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in refusal(path)


@pytest.mark.parametrize("files", [{}, {"batches.meta": b"not a pickle"}, {"batches.meta": pickle.dumps({b"a": 1})}])
def test_wrong_class_names(tmp_path, files):
    if files:
        assert "batches.meta" in refusal(write_folder(tmp_path, python_files(TINY[10]) | files))
    else:
        assert "holds no data of a known kind" in refusal(tmp_path)
