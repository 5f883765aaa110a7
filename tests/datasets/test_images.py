"""Data sets of images: from the files that users have to the pixels that models are shown."""

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import made_images
import numpy as np
import pytest
import torch
from made_images import drawn, encoded, write_folder, write_zip
from PIL import Image
from torch.nn import functional

from datasets import cifar10, dataset, decoding, pictures, registry, tfrecords
from datasets.dataset import Dataset, ImageOptions
from datasets.registry import DATASETS, DatasetSpec, Preparer
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 12, "validation": 4, "test": 4}
BOXES = {"celeba64": (15, 40, 163, 188), "celeba64-140": (19, 39, 159, 179)}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty mirror, and no data set whose size or checksum is of the real files."""
    monkeypatch.setenv("PRIORHOLE_MIRROR", str(tmp_path / "mirror"))
    hq = replace(DATASETS["celebahq256"], shape=(3, 32, 32), prepare=Preparer("datasets.celebahq", {"counts": COUNTS}))
    monkeypatch.setitem(DATASETS, "celebahq256", hq)
    copy = replace(DATASETS["cifar10-jpeg"], prepare=Preparer("datasets.folders", {"validation": 4}))
    monkeypatch.setitem(DATASETS, "cifar10-jpeg", copy)
    return tmp_path / "mirror"


def is_original(monkeypatch, checksums, *names):
    for name in names:
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], checksums=checksums))


@pytest.fixture
def celeba(mirror, monkeypatch):
    """A small CelebA in a zip; the path of that."""
    is_original(monkeypatch, made_images.celeba(mirror, (12, 4, 4)), *BOXES)
    return mirror / "celeba" / "img_align_celeba.zip"


def fetched(name, tmp_path, options=None, **how):
    folder = tmp_path / "prepared" / name
    dataset.fetch(name, folder, tmp_path / "raw", **how)
    return dataset.load(name, folder, options)


def refused(name, tmp_path, **how):
    """The one line of a refusal, after which there is nothing that could be mistaken for data."""
    with pytest.raises(UserError) as error:
        fetched(name, tmp_path, **how)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="missing"):
        dataset.load(name, tmp_path / "prepared" / name)
    return str(error.value)


def content(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def marked(box):
    """A CelebA image, magenta but for its box, whose quarters have four colours; and the box's pixels (3, h, w)."""
    left, top, right, bottom = box
    picture = np.full((218, 178, 3), (255, 0, 255), dtype=np.uint8)
    middle, centre = (top + bottom) // 2, (left + right) // 2
    quarters = [(top, middle, left, centre), (top, middle, centre, right)]
    quarters += [(middle, bottom, left, centre), (middle, bottom, centre, right)]
    for (first, last, begin, end), colour in zip(quarters, made_images.CORNERS.values(), strict=True):
        picture[first:last, begin:end] = colour
    return Image.fromarray(picture), torch.from_numpy(picture[top:bottom, left:right].copy()).permute(2, 0, 1)


@pytest.mark.parametrize("name", BOXES)
def test_a_crop_is_the_stated_box_to_the_pixel_scaled_by_an_antialiased_bilinear_filter(name):
    image, inside = marked(BOXES[name])
    cut = pictures.cut_for((3, 64, 64), (178, 218), DATASETS[name].prepare.settings["box"])
    found = torch.from_numpy(decoding.stack([("a.png", encoded(image, "PNG"))], cut).copy())
    expected = functional.interpolate(inside[None].float(), (64, 64), mode="bilinear", antialias=True)
    assert (found.float() - expected).abs().max() <= 1  # PIL rounds after each axis
    corners = found[0, :, [0, 0, -1, -1], [0, -1, 0, -1]].T.tolist()
    assert corners == [list(colour) for colour in made_images.CORNERS.values()]  # none of what lies around them
    for axis, edge in ((0, 0), (1, 1), (2, 2), (3, 3)):  # one pixel more on any side would show
        wider = list(BOXES[name])
        wider[axis] += -1 if edge < 2 else 1
        seen = decoding.stack([("a.png", encoded(image, "PNG"))], replace(cut, box=tuple(wider)))
        assert not np.array_equal(
            seen[:, :, [0, 0, -1, -1], [0, -1, 0, -1]], found.numpy()[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
        )


@pytest.mark.parametrize("name", BOXES)
def test_celeba_is_cut_out_of_its_files_in_the_order_of_the_partition(name, tmp_path, celeba):
    files = content(celeba)
    image, _ = marked(BOXES[name])
    files["img_align_celeba/000013.jpg"] = encoded(image, quality=100, subsampling=0)  # the first of validation
    write_zip(celeba, files)
    data = fetched(name, tmp_path)
    assert {split: data.size(split) for split in COUNTS} == COUNTS
    corners = data.images("validation", slice(1))[0][:, [0, 0, -1, -1], [0, -1, 0, -1]].T
    assert (corners - torch.tensor(list(made_images.CORNERS.values())) / 255).abs().max() < 0.03
    left, top, right, bottom = BOXES[name]
    for split, first in (("train", 1), ("test", 17)):
        own = Image.open(io.BytesIO(files[f"img_align_celeba/{first:06d}.jpg"])).crop((left, top, right, bottom))
        scaled = np.asarray(own.resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.array_equal(data._tensors[split][0].numpy(), scaled)
    assert data.provenance == {"source": "zip of JPEG images", "jpeg": True}
    with pytest.raises(UserError, match="no labels"):
        data.labels("train")


LAYOUTS = {
    "celeba zip": ("celeba64", "celeba/img_align_celeba.zip", "img_align_celeba/000007.jpg"),
    "celeba folder": ("celeba64-140", "celeba/img_align_celeba", "000007.jpg"),
    "cifar10-jpeg": ("cifar10-jpeg", "cifar10-jpeg/test.zip", "test/class7/0001.jpg"),
    "celebahq folder": ("celebahq256", "celebahq256/images", "7.png"),
    "celebahq zip": ("celebahq256", "celebahq256/images.zip", "7.png"),
}


def laid_out(layout, mirror, monkeypatch):
    """A data set in one of the LAYOUTS: what writes one image anew, and the image as it is."""
    name, place, victim = LAYOUTS[layout]
    if name.startswith("celeba64"):
        is_original(monkeypatch, made_images.celeba(mirror, (12, 4, 4)), name)
    elif name == "cifar10-jpeg":
        made_images.cifar10_jpeg(mirror, (2, 2))
    else:
        made_images.celebahq(mirror, 20)
    path = mirror / place
    if path.suffix and not path.exists():
        write_zip(path, {file.name: file.read_bytes() for file in path.with_suffix("").iterdir()})
        shutil.rmtree(path.with_suffix(""))
    elif not path.exists():
        write_folder(path.parent, content(path.with_suffix(".zip")))
        path.with_suffix(".zip").unlink()

    def write(image):
        if path.suffix:
            write_zip(path, content(path) | {victim: image})
        else:
            (path / victim).write_bytes(image)

    return write, content(path)[victim] if path.suffix else (path / victim).read_bytes()


def damaged(kind, image):
    """An image's bytes, damaged; and what its error says."""
    form = "PNG" if image.startswith(b"\x89PNG") else "JPEG"
    picture = Image.open(io.BytesIO(image))
    width, height = picture.size
    return {
        "zero bytes": (b"", "is empty"),
        "truncated": (image[: len(image) * (9 if form == "JPEG" else 6) // 10], "is truncated or corrupt"),
        "header alone": (image[:20], f"is (truncated or corrupt|not a {form} image)"),
        "text": (b"no image at all", f"is not a {form} image"),
        "web page": (b"<!DOCTYPE html><html></html>", f"is not a {form} image"),
        "other format": (encoded(picture, "GIF"), f"is not a {form} image"),
        "wrong size": (encoded(drawn(0, width + 1, height), form), f"has {width + 1}x{height} pixels, not {width}x{height}"),
        "grey": (encoded(picture.convert("L"), form), "is grey, not RGB"),
        "CMYK": (encoded(picture.convert("CMYK"), "JPEG"), r"is (CMYK, not RGB|not a PNG image)"),
        "palette": (encoded(picture.convert("P"), "PNG"), r"is (of a palette, not RGB|not a JPEG image)"),
        "alpha": (encoded(picture.convert("RGBA"), "PNG"), r"is (RGB with alpha, not RGB|not a JPEG image)"),
    }[kind]


KINDS = ["zero bytes", "truncated", "header alone", "text", "web page", "other format", "wrong size", "grey", "CMYK"]
KINDS += ["palette", "alpha"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_is_none_of_the_data_sets_is_named_and_a_mended_one_is_used(layout, mirror, tmp_path, monkeypatch):
    write, image = laid_out(layout, mirror, monkeypatch)
    name, place, victim = LAYOUTS[layout]
    for kind in KINDS:
        broken, says = damaged(kind, image)
        write(broken)
        said = refused(name, tmp_path)
        assert said.startswith(f"{mirror / place}/{victim} "), kind
        assert re.search(f"{says}.*replace it, and fetch again", said), (kind, said)
    write(image)
    assert fetched(name, tmp_path).size("test") in (4, 20)


def test_a_broken_image_is_named_by_worker_processes_too(celeba, tmp_path):
    write_zip(celeba, content(celeba) | {"img_align_celeba/000019.jpg": b""})
    assert f"{celeba}/img_align_celeba/000019.jpg is empty" in refused("celeba64", tmp_path, workers=2)


def test_bytes_that_changed_inside_a_zip_are_noticed(celeba, tmp_path):
    whole = celeba.read_bytes()
    with zipfile.ZipFile(celeba) as archive:
        entry = archive.getinfo("img_align_celeba/000004.jpg")
    at = entry.header_offset + 200
    celeba.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert re.search(r"img_align_celeba.zip/img_align_celeba/000004.jpg is corrupt \(Bad CRC", refused("celeba64", tmp_path))


PAGE = b"\n<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title>"


@pytest.mark.parametrize("file", ["img_align_celeba.zip", "list_eval_partition.txt"])
def test_a_quota_page_in_the_place_of_a_file_is_recognised(file, celeba, tmp_path):
    (celeba.parent / file).write_bytes(PAGE)
    said = refused("celeba64", tmp_path)
    assert said.startswith(f"{celeba.parent / file} is a web page")
    assert "mmlab.ie.cuhk.edu.hk" in said
    assert f"put them into {celeba.parent}" in said


def test_a_partial_or_missing_archive_says_so_and_where_to_get_it(celeba, tmp_path):
    whole = celeba.read_bytes()
    for wrong, says in ((whole[: len(whole) // 2], "corrupt or partial"), (b"", "corrupt or partial"), (None, "is missing")):
        celeba.unlink()
        if wrong is not None:
            celeba.write_bytes(wrong)
        said = refused("celeba64", tmp_path)
        assert said.startswith(f"{celeba} is {says.removeprefix('is ')}")
        assert "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html" in said
        celeba.touch()
    write_zip(celeba, {"img_align_celeba.zip": whole})  # not unpacked far enough
    assert "holds no images" in refused("celeba64", tmp_path)
    celeba.write_bytes(whole)
    partition = celeba.parent / "list_eval_partition.txt"
    partition.write_text(partition.read_text().replace("000001.jpg 0", "000001.jpg 2"))
    assert refused("celeba64", tmp_path).startswith(f"{partition} is corrupt, partial or not the original")
    partition.unlink()
    assert refused("celeba64", tmp_path).startswith(f"{partition} is missing")


def test_a_wrong_number_of_images_is_counted(celeba, tmp_path):
    files = content(celeba)
    some = {name: image for name, image in files.items() if not name.endswith(("000005.jpg", "000009.jpg"))}
    write_zip(celeba, some)
    assert f"{celeba} lacks 000005.jpg and 1 more of the 20 images that list_eval_partition.txt names" in refused(
        "celeba64", tmp_path
    )
    write_zip(celeba, files | {"img_align_celeba/000021.jpg": encoded(drawn(0, 178, 218))})
    assert f"{celeba} holds 21 images, and list_eval_partition.txt names 20" in refused("celeba64", tmp_path)
    inner = {f"img_align_celeba/{name}": image for name, image in files.items()}
    hidden = {f"__MACOSX/img_align_celeba/._{number:06d}.jpg": b"hidden" for number in range(1, 21)}
    write_zip(celeba, inner | hidden | {"img_align_celeba/": b""})  # as others packed it
    assert fetched("celeba64", tmp_path).size("train") == 12


def test_a_download_that_cannot_be_had_names_the_file_and_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("PRIORHOLE_MIRROR", raising=False)
    original = registry.spec("celeba64")
    utilities = cifar10.import_torchvision().datasets.utils

    def fails(*arguments):
        raise RuntimeError("'gdown' is required.\nYou can install it")

    monkeypatch.setattr(utilities, "download_file_from_google_drive", fails)
    said = refused("celeba64", tmp_path)
    assert re.match(r"img_align_celeba.zip cannot be downloaded \('gdown' is required.\); get img_align", said)
    assert f"put them into {tmp_path / 'raw' / 'celeba'}, or into the folder celeba of one that PRIORHOLE_MIRROR" in said
    asked = []

    def arrives(number, folder, name, checksum):
        asked.append((name, checksum))
        if not (tmp_path / "raw" / "celeba").exists():
            is_original(monkeypatch, made_images.celeba(tmp_path / "raw", (12, 4, 4)), "celeba64")

    monkeypatch.setattr(utilities, "download_file_from_google_drive", arrives)
    refused("celeba64", tmp_path)  # the checksum that was asked for is the real one's
    assert dict(asked)["list_eval_partition.txt"] == original.checksums["list_eval_partition.txt"]
    assert fetched("celeba64", tmp_path).size("train") == 12
    assert len(asked) == 2  # nothing that is there is fetched again


def test_a_killed_fetch_goes_on_where_it_was_and_leaves_nothing_behind(celeba, tmp_path, monkeypatch):
    whole = fetched("celeba64", tmp_path).digest
    shutil.rmtree(tmp_path / "prepared")
    monkeypatch.setattr(pictures, "BYTES_AT_ONCE", 3 * 64 * 64 * 3)
    seen, read = [], []

    def killed(done, total, note):
        seen.append((done, total))
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetched("celeba64", tmp_path, report=killed)
    assert seen == [(3, 20), (6, 20), (9, 20)]
    stack = decoding.stack
    monkeypatch.setattr(decoding, "stack", lambda images, cut: (read.extend(images), stack(images, cut))[1])
    assert fetched("celeba64", tmp_path).digest == whole
    assert [Path(label).name for label, _ in read] == [f"{number:06d}.jpg" for number in range(7, 21)]
    assert not list((tmp_path / "raw").iterdir())


def test_what_was_decoded_of_another_archive_is_not_gone_on_with(celeba, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "BYTES_AT_ONCE", 3 * 64 * 64 * 3)

    def killed(done, total, note):
        if done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetched("celeba64", tmp_path, report=killed)
    write_zip(celeba, content(celeba) | {"img_align_celeba/000001.jpg": encoded(drawn(99, 178, 218))})
    after = fetched("celeba64", tmp_path)
    shutil.rmtree(tmp_path / "prepared")
    assert fetched("celeba64", tmp_path).digest == after.digest


def test_the_number_of_processes_does_not_change_the_data(celeba, tmp_path):
    digest = fetched("celeba64", tmp_path).digest
    shutil.rmtree(tmp_path / "prepared")
    assert fetched("celeba64", tmp_path, workers=2).digest == digest


def test_cifar10_has_its_images_labels_and_order(mirror, tmp_path, monkeypatch):
    for protocol in (2, 4):
        is_original(monkeypatch, made_images.cifar10(mirror, (50, 10), protocol), "cifar10")
        monkeypatch.setitem(
            DATASETS, "cifar10", replace(DATASETS["cifar10"], prepare=Preparer("datasets.cifar10", {"validation": 6}))
        )
        data = fetched("cifar10", tmp_path)
        assert [data.size(split) for split in ("train", "validation", "test", "train+validation")] == [44, 6, 10, 50]
        expected = np.stack([np.asarray(drawn(i)).transpose(2, 0, 1) for i in range(60)]) / 255
        whole = torch.cat([data.images("train+validation"), data.images("test")])
        assert torch.equal(whole, torch.from_numpy(expected).float())
        assert data.labels("train+validation").tolist() == [i % 10 for i in range(50)]
        assert data.provenance == {"source": "cifar-10-python.tar.gz", "jpeg": False}


class Calls:
    def __reduce__(self):
        return os.mkdir, ("called",)


BATCH = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
BATCHES = {
    "calls something": ({"data": Calls()}, "calls posix.mkdir"),
    "no arrays": (b"not a pickle", "is no batch"),
    "empty": (b"", "is no batch"),
    "wrong size": (BATCH | {"data": np.zeros((4, 3000), np.uint8)}, r"uint8 \(4, 3000\) and 4 labels"),
    "fewer labels": (BATCH | {"labels": [0]}, r"uint8 \(4, 3072\) and 1 labels"),
    "floats": (BATCH | {"data": np.zeros((4, 3072), np.float32)}, "float32"),
    "other keys": ({"fine_labels": [0]}, r"is no batch of CIFAR-10 \('data'\)"),
    "missing": (None, "lacks data_batch_3"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_that_is_none_of_cifar10s_is_named_and_nothing_in_it_is_called(kind, mirror, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken, says = BATCHES[kind]
    files = {name: pickle.dumps(BATCH) for names in cifar10.BATCHES.values() for name in names}
    files["data_batch_3"] = broken if isinstance(broken, bytes) else pickle.dumps(broken)
    if broken is None:
        del files["data_batch_3"]
    is_original(monkeypatch, made_images.cifar10_archive(mirror, files), "cifar10")
    said = refused("cifar10", tmp_path)
    assert re.search(says, said)
    assert "data_batch_3" in said
    assert str(mirror / "cifar10" / "cifar-10-python.tar.gz") in said
    assert not Path("called").exists()


def test_an_archive_that_is_not_the_original_is_not_read(mirror, tmp_path, monkeypatch):
    is_original(monkeypatch, made_images.cifar10(mirror, (50, 10)), "cifar10")
    path = mirror / "cifar10" / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused("cifar10", tmp_path).startswith(f"{path} is corrupt, partial or not the original (its md5 differs)")
    path.write_bytes(PAGE)
    assert refused("cifar10", tmp_path).startswith(f"{path} is a web page")
    path.unlink()
    assert refused("cifar10", tmp_path).startswith(f"{path} is missing")
    monkeypatch.delenv("PRIORHOLE_MIRROR")
    monkeypatch.setattr(cifar10.import_torchvision().datasets.CIFAR10, "url", "http://127.0.0.1:9/")  # nobody listens
    assert re.match(r"CIFAR-10 cannot be downloaded \(.*PRIORHOLE_MIRROR", refused("cifar10", tmp_path))


def test_the_classes_of_folders_are_dealt_out_in_turn(mirror, tmp_path):
    made_images.cifar10_jpeg(mirror, (3, 2))
    data = fetched("cifar10-jpeg", tmp_path)
    assert data.labels("train+validation").tolist() == [*range(10)] * 3
    assert data.labels("test").tolist() == [*range(10)] * 2
    assert data.size("validation") == 4
    files = content(mirror / "cifar10-jpeg" / "train.zip")
    second = np.asarray(Image.open(io.BytesIO(files["train/class1/0000.jpg"]))).transpose(2, 0, 1)
    assert np.array_equal(data._tensors["train"][1], second)


def test_images_without_classes_have_no_labels(mirror, tmp_path):
    for part, count in (("train", 10), ("test", 5)):
        files = {f"{part}/{i}.jpg": encoded(drawn(i)) for i in range(count)}
        write_zip(mirror / "cifar10-jpeg" / f"{part}.zip", files)
    data = fetched("cifar10-jpeg", tmp_path)
    assert [data.size(split) for split in COUNTS] == [6, 4, 5]
    with pytest.raises(UserError, match="no labels"):
        data.labels("train")


def test_folders_that_do_not_fit_each_other_are_refused(mirror, tmp_path, monkeypatch):
    made_images.cifar10_jpeg(mirror, (3, 2))
    path = mirror / "cifar10-jpeg" / "test.zip"
    files = content(path)
    write_zip(path, {name: image for name, image in files.items() if "class7" not in name})
    assert "'class7' is a class in one of train and test alone" in refused("cifar10-jpeg", tmp_path)
    counted = Preparer("datasets.folders", {"validation": 4, "counts": {"train": 30, "test": 21}})
    monkeypatch.setitem(DATASETS, "cifar10-jpeg", replace(DATASETS["cifar10-jpeg"], prepare=counted))
    write_zip(path, files)
    assert refused("cifar10-jpeg", tmp_path).startswith(f"{path} holds 20 images, not 21")
    small = Preparer("datasets.folders", {"validation": 30})
    monkeypatch.setitem(DATASETS, "cifar10-jpeg", replace(DATASETS["cifar10-jpeg"], prepare=small))
    assert "too few" in refused("cifar10-jpeg", tmp_path)
    path.unlink()
    assert re.match(rf"{path} is missing.*PRIORHOLE_MIRROR must name a folder", refused("cifar10-jpeg", tmp_path))


def pixels():
    return np.stack([np.asarray(drawn(i)) for i in range(20)])  # (n, height, width, channels)


def test_every_source_of_celebahq_gives_the_same_pixels_and_is_told_apart(mirror, tmp_path):
    folder, found = mirror / "celebahq256", {}
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", pixels())
    found["npy"] = fetched("celebahq256", tmp_path)
    shutil.rmtree(tmp_path / "prepared")
    np.save(folder / "images.npy", pixels().transpose(0, 3, 1, 2))
    found["npy, channels first"] = fetched("celebahq256", tmp_path)
    shutil.rmtree(tmp_path / "prepared")
    (folder / "images.npy").unlink()
    made_images.celebahq_tfrecords(mirror, (16, 4))
    found["TFRecords"] = fetched("celebahq256", tmp_path)
    shutil.rmtree(tmp_path / "prepared")
    shutil.rmtree(folder)
    made_images.celebahq(mirror, 20)
    found["folder of PNG images, 32x32"] = fetched("celebahq256", tmp_path)
    shutil.rmtree(tmp_path / "prepared")
    write_zip(folder / "images.zip", {path.name: path.read_bytes() for path in (folder / "images").iterdir()})
    found["zip of PNG images, 32x32"] = fetched("celebahq256", tmp_path)
    expected = torch.from_numpy(pixels()).permute(0, 3, 1, 2) / 255
    for source, data in found.items():
        assert {split: data.size(split) for split in COUNTS} == COUNTS
        assert torch.equal(data.images("train+validation+test"), expected), source
        jpeg = None if source.startswith("npy") else False
        assert data.provenance == {"source": source.partition(", channels")[0], "jpeg": jpeg}


def test_celebahq_of_larger_images_is_scaled_and_says_so(mirror, tmp_path):
    images = {f"{i:05d}.jpg": encoded(drawn(i, 128, 128)) for i in range(20)}
    write_zip(mirror / "celebahq256" / "images.zip", images)
    data = fetched("celebahq256", tmp_path)
    assert data.provenance == {"source": "zip of JPEG images, 128x128 scaled to 32x32", "jpeg": True}
    own = Image.open(io.BytesIO(images["00000.jpg"])).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(data._tensors["train"][0].numpy().transpose(1, 2, 0), np.asarray(own))
    shutil.rmtree(tmp_path / "prepared")
    images = {f"{i:05d}.jpg": encoded(drawn(i, 100, 100)) for i in range(20)}
    write_zip(mirror / "celebahq256" / "images.zip", images)
    assert "00000.jpg has 100x100 pixels, not 32x32 or 2, 4 or 8 times that" in refused("celebahq256", tmp_path)
    write_zip(mirror / "celebahq256" / "images.zip", dict(list(images.items())[:19]))
    assert "images.zip holds 19 images, not 20" in refused("celebahq256", tmp_path)


def test_an_array_that_is_not_celebahqs_is_refused(mirror, tmp_path):
    path = mirror / "celebahq256" / "images.npy"
    path.parent.mkdir(parents=True)
    for array, says in (
        (pixels()[:19], "holds 19 images, not 20"),
        (pixels().astype(np.float32), "holds float32"),
        (pixels()[:, :30], r"holds uint8 \(20, 30, 32, 3\)"),
        (pixels()[0, 0, 0, 0], r"holds uint8 \(\)"),
        (np.array([{}]), "no array"),
    ):
        np.save(path, array)
        assert re.match(f"{path}.*{says}", refused("celebahq256", tmp_path)), says
    np.save(path, pixels())
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"", PAGE):
        path.write_bytes(part)
        assert refused("celebahq256", tmp_path).startswith(f"{path} is truncated or no array")


def test_records_that_are_not_celebahqs_are_refused(mirror, tmp_path):
    made_images.celebahq_tfrecords(mirror, (16, 4))
    shard = next((mirror / "celebahq256").rglob("train-r08-s-0002*"))
    whole, record = shard.read_bytes(), made_images.record(drawn(0))
    frame = len(made_images.framed(record))
    assert len(whole) == 4 * frame
    for wrong, says in (
        (whole[:-1], f"{shard} is truncated or corrupt at its record 3"),
        (whole[: 2 * frame + 5], f"{shard} is truncated or corrupt at its record 2"),
        (whole[:frame] + b"\1" + whole[frame:], f"{shard} is truncated or corrupt at its record 1"),
        (whole[:-frame], r"\*/train-r08-\*.tfrecords holds 15 images, not 16"),
        (b"", "holds 12 images, not 16"),
        (whole[:-frame] + made_images.framed(b"\xff" * 9), f"{shard}, at byte {3 * frame + 12}: no image .*cut"),
        (whole[:-frame] + made_images.framed(b""), f"{shard}, at byte {3 * frame + 12}: no image"),
        (whole[:-frame] + made_images.framed(record[:-50]), f"{shard}, at byte {3 * frame + 12}: no image"),
        (whole[:-frame] + made_images.framed(made_images.record(drawn(0, 64, 32))), r"an image of \[32, 64, 3\]"),
    ):
        shard.write_bytes(wrong)
        assert re.search(says.replace(str(shard), re.escape(str(shard))), refused("celebahq256", tmp_path)), says
    shard.write_bytes(whole)
    assert fetched("celebahq256", tmp_path).size("train") == 12


def test_checksums_of_records_are_those_of_the_standard():
    plain = (tfrecords.masked_checksum(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert ((plain << 15 | plain >> 17) & 0xFFFFFFFF) == 0xE3069283  # RFC 3720's check value of CRC-32C


@pytest.fixture
def levels(monkeypatch):
    """Sixteen images whose levels are all 256, presented as one asks."""
    entry = DatasetSpec((1, 16, 16), "images", "", "", lambda raw: {})
    monkeypatch.setitem(DATASETS, "levels", entry)
    images = torch.arange(256).view(1, 1, 16, 16).expand(16, -1, -1, -1).to(torch.uint8)

    def shown(**options):
        splits = {"train": images[:10], "validation": images[10:12], "test": images[12:]}
        return Dataset("levels", splits, "", ImageOptions(**options))

    return shown


def test_eight_bits_are_a_levels_255th_part_and_five_are_nvaes(levels):
    grid = torch.arange(256.0).view(1, 16, 16)
    for split in ("train", "test"):
        assert torch.equal(levels().examples(split, slice(1))[0], grid / 255)
        five = levels(bits=5)
        assert torch.equal(five.examples(split, slice(1))[0], (grid / 8).floor() / 31)
        assert torch.equal(five.images(split, slice(1))[0], grid / 255)  # the reference of a FID
    assert torch.equal(levels(bits=5).train_batch(2, 0, 0)[0], (grid / 8).floor() / 31)
    assert sorted(levels(bits=5).examples("test").unique().tolist()) == pytest.approx([i / 31 for i in range(32)])


def test_training_batches_are_flipped_with_even_odds_and_nothing_else_is(levels):
    grid = torch.arange(256.0).view(1, 16, 16) / 255
    data, still = levels(flip=True), levels()
    mirrored = 0
    for step in range(100):
        batch = data.train_batch(10, 0, step)
        assert torch.equal(batch, data.train_batch(10, 0, step))
        flips = [torch.equal(x, grid.flip(-1)) for x in batch]
        assert all(flip or torch.equal(x, grid) for flip, x in zip(flips, batch, strict=True))
        mirrored += sum(flips)
        assert torch.equal(still.train_batch(10, 0, step)[0], grid)
        views = data.train_views(10, 0, step)
        assert flips == (views >= 10).tolist()
        assert torch.equal(still.train_views(10, 0, step), views % 10)
    assert (data.views, still.views) == (20, 10)
    assert 420 < mirrored < 580  # five standard deviations of 1000 throws
    for found in (data.examples("train"), data.examples("test"), data.images("train")):
        assert torch.equal(found, grid.expand_as(found))


def test_several_splits_in_turn_are_read_as_one(tmp_path, mirror, monkeypatch):
    made_images.celebahq(mirror, 20)
    data = fetched("celebahq256", tmp_path)
    whole = torch.cat([data.images(split) for split in ("train", "validation")])
    for rows in (slice(None), slice(3), slice(10, 14), slice(2, None, 5), torch.tensor([15, 0, 12, 11, 0])):
        assert torch.equal(data.images("train+validation", rows), whole[rows])
    assert data.size("train+validation") == 16


def test_readers_of_images_are_no_part_of_what_other_data_are_made_by(mirror, tmp_path):
    script = "import sys, datasets.dataset, datasets.registry\n"
    script += "print([m for m in ('PIL', 'zipfile', 'datasets.decoding', 'datasets.celeba') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert "PIL" not in done.stdout
    assert "datasets" not in done.stdout
    of_digits, of_faces = (dataset._identity(name) for name in ("digits", "celeba64"))
    assert "settings" not in of_digits.config
    assert of_faces.config["settings"] == {"box": [15, 40, 163, 188]}
    assert len({of_digits.source, of_faces.source, dataset._identity("cifar10").source}) == 3


def test_a_folder_of_another_crop_is_refused_by_the_key_that_differs(celeba, tmp_path):
    fetched("celeba64", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        entry = replace(DATASETS["celeba64"], prepare=Preparer("datasets.celeba", {"box": [0, 0, 64, 64]}))
        patch.setitem(DATASETS, "celeba64", entry)
        with pytest.raises(UserError, match=r"settings\.box"):
            dataset.load("celeba64", tmp_path / "prepared" / "celeba64")


def test_the_example_data_set_of_the_docs_is_one_entry(mirror, tmp_path, monkeypatch):
    readme = (ROOT / "docs" / "extending.md").read_text()
    code = re.search(r"```python\n(\"\w+\": DatasetSpec\(.*?)```", readme, re.DOTALL)[1]
    ((name, entry),) = eval("{" + code + "}", vars(registry)).items()
    assert name not in DATASETS
    monkeypatch.setitem(DATASETS, name, entry)
    width, height = entry.prepare.settings["size"]
    for part, count in (("train", entry.prepare.settings["validation"] + 5), ("test", 6)):
        files = {f"{kind}/{i}.jpg": encoded(drawn(i, width, height)) for kind in ("rose", "tulip") for i in range(count)}
        write_folder(mirror / name / part, files)
    data = fetched(name, tmp_path, ImageOptions(flip=True))
    assert data.train_batch(4, 0, 0).shape == (4, *entry.shape)
    assert data.labels("test").tolist() == [0, 1] * 6
    assert data.provenance == {"source": "folder of JPEG images", "jpeg": True}


def real(*path):
    return Path(os.environ.get("PRIORHOLE_MIRROR", "/nowhere")).joinpath(*path).exists()


@pytest.mark.skipif(not real("cifar10-jpeg", "train.zip"), reason="needs a mirror of the JPEG copy of CIFAR-10")
def test_the_real_jpeg_copy_of_cifar10_is_what_everyone_knows(tmp_path):
    data = fetched("cifar10-jpeg", tmp_path)
    assert [data.size(split) for split in COUNTS] == [45_000, 5_000, 10_000]
    assert data.labels("validation").bincount().tolist() == [500] * 10
    means = torch.stack([data.images("train", torch.arange(i, 45_000, 100)).mean((0, 2, 3)) for i in range(5)]).mean(0)
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)
