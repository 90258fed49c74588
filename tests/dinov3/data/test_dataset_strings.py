"""Dataset strings, data sets of encoded images, ImageNet's tables, folders of images."""

from __future__ import annotations

import io
import sys
import types

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov3.cells import registry
from dinov3.data import loaders, make_dataset
from dinov3.data.datasets import ImageFolder, ImageNet
from dinov3.data.datasets.decoders import DenseTargetDecoder, ImageDataDecoder, TargetDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.loaders import DatasetKeyError, DatasetSplitError, register_dataset

parse = loaders._parse_dataset_str


def encoded(mode: str = "RGB", size: tuple[int, int] = (8, 6), value: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "I;16") else (value, 2, 3)).save(stream, "PNG")
    return stream.getvalue()


# --- the grammar; expected values are upstream's ---


def test_names_and_keys():
    assert parse("ImageNet") == (ImageNet, {})
    assert parse("ImageNet:split=TRAIN:root=/r:extra=/e") == (
        ImageNet,
        {"split": ImageNet.Split.TRAIN, "root": "/r", "extra": "/e"},
    )
    assert parse("ImageNet:root=/a:root=/b")[1] == {"root": "/b"}  # the last counts
    assert parse("ImageFolder:root=")[1] == {"root": ""}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("/data/run=3", "/data/run=3"),
        ("/data/2026-01-01T10:30:00/x", "/data/2026-01-01T10:30:00/x"),
        (r"/data/a\:b=c", "/data/a:b=c"),
        ("C:/data", "C:/data"),
        ("~/data", "/home/a/data"),
        ("/data/~/x", "/data/~/x"),
    ],
)
def test_any_path_can_be_given(monkeypatch, value, path):
    monkeypatch.setenv("HOME", "/home/a")
    arguments = parse(f"ImageNet:root={value}:split=VAL")[1]
    assert arguments == {"root": path, "split": ImageNet.Split.VAL}


@pytest.mark.parametrize(
    ("text", "kinds", "message"),
    [
        ("Nope:split=TRAIN", (ValueError,), "one of ImageFolder, .*ImageNet, got 'Nope': choose"),
        ("ImageNet:root", (ValueError,), "must be Name:key=value:..., got 'root' in"),
        (
            "ImageNet:color=red",
            (DatasetKeyError, ValueError, AssertionError),
            "Keys of ImageNet must be among root, extra, split, got 'color': correct",
        ),
        (
            "ImageNet:split=BOGUS",
            (DatasetSplitError, ValueError, KeyError),
            "^The split of ImageNet must be one of TRAIN, VAL, TEST, got 'BOGUS': choose one of these$",
        ),
        ("ADE20K:split=VAL:root=/r", (ValueError,), "got 'ADE20K', which is not part of this tree"),
        ("CocoCaptions:split=TRAIN", (ValueError,), "'CocoCaptions', which is not part of this"),
        ("NYU:split=VAL:root=/r", (ValueError,), "got 'NYU', which is not part of this tree"),
        ("ImageNet22k:root=/r:extra=/e", (ValueError,), "'ImageNet22k', which is not part of"),
    ],
)
def test_errors_of_the_grammar(text, kinds, message):
    for kind in kinds:
        with pytest.raises(kind, match=message):
            make_dataset(dataset_str=text)


def test_missing_keys_are_named():
    with pytest.raises(
        ValueError, match=r"split, root, extra, got a string without root, extra: add"
    ):
        make_dataset(dataset_str="ImageNet:split=VAL")
    with pytest.raises(ValueError, match=r"ImageFolder must have root, .* add ':root=\.\.\.'"):
        make_dataset(dataset_str="ImageFolder")


class Options(ExtendedVisionDataset):
    """A data set with typed options of its own."""

    STRING_OPTIONS = {"count": int, "share": float, "gray": bool, "channels": str}  # noqa: RUF012

    def __init__(self, *, root: str = "", count: int = 2, share=0.5, gray=False, channels="", **kw):
        super().__init__(root=root, **kw)
        self.options = (count, share, gray, channels)

    def get_image_data(self, index: int) -> bytes:
        return encoded()

    def get_target(self, index: int) -> int:
        return index + 10

    def __len__(self) -> int:
        return self.options[0]


@pytest.fixture
def options(monkeypatch):
    """`Options` registered as "Mine" in a module that is imported on first use."""
    monkeypatch.setattr(registry, "DATASETS", dict(registry.DATASETS))
    module = types.ModuleType("module_of_mine")
    module.Options = Options
    register_dataset("Mine", "module_of_mine:Options")
    monkeypatch.setitem(sys.modules, "module_of_mine", module)


@pytest.mark.usefixtures("options")
def test_data_sets_have_typed_options():
    made = make_dataset(dataset_str="Mine:count=7:share=0.25:gray=true:channels=DNA+ER")
    assert made.options == (7, 0.25, True, "DNA+ER")
    assert make_dataset(dataset_str="Mine:gray=0").options == (2, 0.5, False, "")


@pytest.mark.usefixtures("options")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mine:count=many", "count of Mine must be of type int, got 'many': correct the string"),
        ("Mine:gray=perhaps", "gray of Mine must be of type bool, got 'perhaps'"),
        ("Mine:colour=1", "among root, extra, split, count, share, gray, channels, got 'colour'"),
        ("Nope", "ImageFolder, .*Mine, got 'Nope'"),
    ],
)
def test_errors_of_typed_options(text, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(dataset_str=text)


@pytest.mark.parametrize(
    ("name", "address"), [("A:b", "m:C"), ("A", "m.C"), ("", "m:C"), ("A", ":C")]
)
def test_registration_needs_an_address(name, address):
    with pytest.raises(ValueError, match="as 'module:Class', got"):
        register_dataset(name, address)


def test_registered_names_can_be_imported():
    for name in loaders.DATASETS:
        class_, arguments = parse(name)
        assert class_.__name__ == name
        assert arguments == {}


# --- samples ---


@pytest.mark.usefixtures("options")
def test_transforms_act():
    plain = make_dataset(dataset_str="Mine")
    image, target = plain[1]
    assert (image.size, image.mode, target) == ((8, 6), "RGB", 11)
    made = make_dataset(
        dataset_str="Mine",
        transform=lambda image: image.size,
        target_transform=lambda target: -target,
    )
    assert made[1] == ((8, 6), -11)
    both = make_dataset(dataset_str="Mine", transforms=lambda image, target: (target, image.mode))
    assert both[1] == (11, "RGB")
    with pytest.raises(ValueError, match="transforms` must come alone"):
        make_dataset(dataset_str="Mine", transform=len, transforms=len)


def test_data_sets_of_other_kinds_get_the_attributes(monkeypatch):
    class Bare:
        def __init__(self, **kwargs):
            pass

        def __len__(self) -> int:
            return 1

    module = types.ModuleType("module_of_bare")
    module.Bare = Bare
    monkeypatch.setitem(sys.modules, "module_of_bare", module)
    monkeypatch.setattr(registry, "DATASETS", {"Bare": "module_of_bare:Bare"})
    made = make_dataset(dataset_str="Bare", transform=len, target_transform=abs)
    assert (made.transform, made.target_transform, made.transforms) == (len, abs, None)


def test_a_sample_that_cannot_be_read_is_named():
    class Broken(Options):
        def get_image_data(self, index: int) -> bytes:
            return b"no image"

    with pytest.raises(
        RuntimeError, match=r"sample 1 must be readable, got an error \(cannot ident"
    ):
        Broken()[1]


def test_decoders():
    assert ImageDataDecoder(encoded("L")).decode().mode == "RGB"
    assert TargetDecoder(5).decode() == 5
    assert DenseTargetDecoder(encoded("L")).decode().mode == "L"
    made = Options(target_decoder=DenseTargetDecoder, image_decoder=DenseTargetDecoder)
    assert made.target_decoder is made.image_decoder is DenseTargetDecoder


# --- ImageNet ---


@pytest.fixture
def imagenet(tmp_path):
    """Two classes, two training images each, one for validation, two for testing."""
    names = {"n01": "tench", "n02": "great white shark, white shark"}
    for class_id in names:
        for part in ("train", "val"):
            (tmp_path / part / class_id).mkdir(parents=True)
    (tmp_path / "test").mkdir()
    for value, (class_id, number) in enumerate(
        [("n02", 7), ("n01", 3), ("n01", 12), ("n02", 5)], start=1
    ):
        path = tmp_path / "train" / class_id / f"{class_id}_{number}.JPEG"
        path.write_bytes(encoded(value=value))
    (tmp_path / "val/n02/ILSVRC2012_val_00000004.JPEG").write_bytes(encoded(value=50))
    for number in (1, 2):
        path = tmp_path / f"test/ILSVRC2012_test_{number:08d}.JPEG"
        path.write_bytes(encoded(value=60 + number))
    (tmp_path / "labels.txt").write_text("".join(f"{k},{v}\n" for k, v in names.items()))
    return tmp_path


def made_imagenet(folder, part: str) -> ImageNet:
    made = ImageNet(split=ImageNet.Split[part], root=str(folder), extra=str(folder / "extra"))
    made.dump_extra()
    return made


def test_imagenet(imagenet):
    train = made_imagenet(imagenet, "TRAIN")
    assert len(train) == 4
    assert [train.get_image_relpath(i) for i in range(4)] == [
        "train/n01/n01_12.JPEG",
        "train/n01/n01_3.JPEG",
        "train/n02/n02_5.JPEG",
        "train/n02/n02_7.JPEG",
    ]
    assert [train[i][0].getpixel((0, 0))[0] for i in range(4)] == [3, 2, 4, 1]
    assert [train[i][1] for i in range(4)] == [0, 0, 1, 1]
    assert train.get_targets().tolist() == [0, 0, 1, 1]
    assert (train.get_class_id(2), train.get_class_name(2)) == (
        "n02",
        "great white shark, white shark",
    )
    assert train.split is ImageNet.Split.TRAIN
    val = made_imagenet(imagenet, "VAL")
    assert val.get_image_relpath(0) == "val/n02/ILSVRC2012_val_00000004.JPEG"
    assert (val[0][0].getpixel((0, 0))[0], val[0][1]) == (50, 0)


def test_imagenets_test_part_has_no_targets(imagenet):
    test = made_imagenet(imagenet, "TEST")
    assert test.get_image_relpath(1) == "test/ILSVRC2012_test_00000002.JPEG"
    assert (test[1][0].getpixel((0, 0))[0], test[1][1]) == (62, None)
    assert test.get_targets() is test.get_class_id(0) is test.get_class_name(0) is None


def test_imagenet_by_its_string(imagenet):
    made_imagenet(imagenet, "TRAIN")
    made = make_dataset(dataset_str=f"ImageNet:split=TRAIN:root={imagenet}:extra={imagenet}/extra")
    assert len(made) == 4
    (imagenet / "train/n01/n01_3.JPEG").unlink()
    with pytest.raises(RuntimeError, match=r"train/n01/n01_3\.JPEG must be readable"):
        made[1]


def test_imagenet_without_tables_or_images(tmp_path):
    made = ImageNet(split=ImageNet.Split.VAL, root=str(tmp_path), extra=str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"entries-VAL\.npy: make it with ImageNet.dump_extra"
    ):
        len(made)
    with pytest.raises(FileNotFoundError, match=r"must have images, got none in .*val: check root"):
        made.dump_extra()


def test_split_paths():
    split = ImageNet.Split.TRAIN
    assert (split.length, ImageNet.Split.VAL.length) == (1_281_167, 50_000)
    path = split.get_image_relpath(44, "n05")
    assert path == "train/n05/n05_44.JPEG"
    assert split.parse_image_relpath(path) == ("n05", 44)
    assert ImageNet.Split.VAL.get_dirname() == "val"


# --- folders ---


def test_a_folder_of_images(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.PNG", "b/.hidden.png", "b/._a.png"):
        (tmp_path / name).write_bytes(encoded(value=len(name)))
    (tmp_path / "notes.txt").write_text("no image")
    made = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}")
    assert [made.get_sample_name(i) for i in range(len(made))] == ["b/a.PNG", "z.png"]
    assert made[0][1] is None
    assert made[0][0].getpixel((0, 0)) == (7, 2, 3)
    part = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:split=b")
    assert [part.get_sample_name(i) for i in range(len(part))] == ["a.PNG"]


def test_other_modes_become_rgb(tmp_path):
    Image.new("L", (2, 2), 9).save(tmp_path / "a.tif")
    Image.new("RGBA", (2, 2), (1, 2, 3, 4)).save(tmp_path / "b.png")
    made = ImageFolder(root=str(tmp_path))
    assert [made[i][0].getpixel((0, 0)) for i in range(2)] == [(9, 9, 9), (1, 2, 3)]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_12_bit_pictures_keep_their_grey_levels(tmp_path, suffix, channels):
    """PIL takes the upper 8 of 16 bits of a colour picture: 16 levels of 4,096."""
    rng = np.random.default_rng(1)
    planes = rng.integers(0, 4096, (64, 64, channels)).astype(np.uint16)
    if suffix == "tif":
        kind = "rgb" if channels == 3 else "minisblack"
        tifffile.imwrite(tmp_path / "a.tif", planes.squeeze(), photometric=kind)
    else:
        cv2.imwrite(str(tmp_path / "a.png"), planes[..., ::-1])
    pixels = np.asarray(ImageFolder(root=str(tmp_path))[0][0])
    assert pixels.shape == (64, 64, 3)
    assert len(np.unique(pixels)) > 200
    expected = np.clip(planes / 4095, 0, 1) * 255
    assert np.abs(pixels - expected).max() < 5


def test_stacks_are_no_pictures(tmp_path):
    stack = np.random.default_rng(1).integers(0, 4096, (5, 32, 32)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "raw.tif", stack, photometric="minisblack")
    with pytest.raises(ValueError, match=r"raw\.tif .*one channel or three, got 5: use JUMPCell"):
        ImageFolder(root=str(tmp_path))[0]


def pictures(folder, count: int) -> None:
    for index in range(count):
        Image.new("RGB", (6, 4), (index, 2, 3)).save(folder / f"{index:02}.png")


def test_all_broken_files_are_listed_before_the_start(tmp_path):
    pictures(tmp_path, 8)
    (tmp_path / "03.png").write_bytes(b"no picture")
    (tmp_path / "05.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"got 2 of 8 .*remove 03.png \(.*\), 05.png \(.*\), or"
    ) as e:
        make_dataset(dataset_str=f"ImageFolder:root={tmp_path}")
    assert "max_lost_share" in str(e.value)
    made = make_dataset(dataset_str=f"ImageFolder:root={tmp_path}:max_lost_share=0.25")
    assert len(made) == 6
    assert "03.png" not in made.paths


def test_a_picture_that_breaks_later_has_a_stand_in(tmp_path, caplog):
    pictures(tmp_path, 8)
    whole = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(whole[:45])  # the header is intact
    patient = ImageFolder(root=str(tmp_path), max_lost_share=0.2)
    with caplog.at_level("WARNING"):
        assert [patient[2][0].getpixel((0, 0))[0] for _ in range(2)] == [3, 3]
    assert caplog.text.count("02.png is broken and replaced") == 1
    with pytest.raises(ValueError, match=r"got 1 of 8 .*02\.png"):
        ImageFolder(root=str(tmp_path))[2]


def test_large_pictures_are_read_if_asked(tmp_path, monkeypatch):
    """PIL refuses more than twice its own limit, which the limit of the data set replaces."""
    pictures(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    Image.new("RGB", (1200, 1000), (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("RGB", (1200, 1000), (1, 2, 3)).save(tmp_path / "b.tif")
    assert len(ImageFolder(root=str(tmp_path), max_megapixels=1.3)) == 3
    assert ImageFolder(root=str(tmp_path), max_megapixels=1.3)[1][0].size == (1200, 1000)
    assert Image.MAX_IMAGE_PIXELS == 5
    with pytest.raises(
        ValueError, match=r"got 2 of 3 .*1 megapixels, more than max_megapixels=0.5"
    ):
        ImageFolder(root=str(tmp_path), max_megapixels=0.5)


def test_what_is_left_out_is_counted(tmp_path, caplog):
    pictures(tmp_path, 2)
    for name in ("a.czi", "b.czi", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level("INFO"):
        ImageFolder(root=str(tmp_path))
    assert (
        "2 pictures; left out: 0 broken, 1 hidden, 3 of other kinds (2 .czi, 1 .txt)" in caplog.text
    )


def test_a_folder_must_have_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder, got .*nowhere: check root"):
        ImageFolder(root=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"must hold images \(.bmp, .*\), got none in"):
        ImageFolder(root=str(tmp_path))
