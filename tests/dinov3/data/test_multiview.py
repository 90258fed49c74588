"""Multi-channel fields and their views."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from omegaconf import OmegaConf
from PIL import Image

from dinov3.cells.fields import FieldError, decode_planes, make_field, robust_range
from dinov3.configs import get_default_config
from dinov3.data.augmentations_multiview import (
    DataAugmentationMultiView,
    FluorescencePhotometrics,
    build_multiview_augmentation,
    photometrics_on_batch,
)
from dinov3.data.datasets.jump_cellpainting import JUMPCellPaintingMultiView, find_fields
from dinov3.data.loaders import make_dataset, seed_everything


def plane(seed: int, shape=(64, 80), high=4000) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, high, shape).astype(np.uint16)


@pytest.fixture
def harmony(tmp_path) -> Path:
    """Two plates with two fields each, three channels; the plates number their channels differently."""
    for plate in ("P1", "P2"):
        for well in ("r01c01", "r01c02"):
            for channel in (1, 2, 3):
                path = tmp_path / plate / f"{well}f01p01-ch{channel}sk1fk1fl1.tiff"
                path.parent.mkdir(exist_ok=True)
                tifffile.imwrite(path, plane(channel + 10 * (plate == "P2")))
    (tmp_path / "numbers.csv").write_text(
        "plate,number,channel\n"
        "P1,ch1,DNA\nP1,ch2,ER\nP1,ch3,AGP\nP2,ch1,AGP\nP2,ch2,DNA\nP2,ch3,ER\n"
    )
    return tmp_path


# --- finding fields ---


def test_channel_names_come_from_the_table(harmony):
    """The same number is another stain on the other plate."""
    data = JUMPCellPaintingMultiView(
        root=str(harmony), pattern="harmony", channels_table="numbers.csv", channels="DNA+ER"
    )
    assert [data.get_sample_name(i) for i in range(4)] == [
        f"{p}/{w}/f01/p01" for p in ("P1", "P2") for w in ("r01c01", "r01c02")
    ]
    assert data.load_field(0).channels == ("DNA", "ER")
    np.testing.assert_array_equal(data.load_field(0).planes[0], plane(1))
    np.testing.assert_array_equal(data.load_field(2).planes[0], plane(12)), "P2's DNA is ch2"
    assert data.load_field(0).planes.dtype == np.uint16


def test_plates_are_never_mixed(harmony):
    fields = find_fields(harmony, pattern="harmony")
    assert len(fields) == 4
    assert {f.plate for f in fields} == {"P1", "P2"}
    for item in fields:
        assert all(item.plate in path for path in item.files.values())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("cellvoyager", [f"PLATE_K06_T0001F001L01A01Z01C0{c}.tif" for c in (1, 2)]),
        ("imagexpress", [f"HTS_A01_s1_w{c}0A1B.tif" for c in (1, 2)]),
        (r"(?P<field>\d+)-(?P<channel>red|green)\.png", ["7-red.png", "7-green.png"]),
    ],
)
def test_naming_schemes(tmp_path, pattern, names):
    for number, name in enumerate(names):
        if name.endswith("png"):
            Image.fromarray(plane(number).astype(np.uint8)).save(tmp_path / name)
        else:
            tifffile.imwrite(tmp_path / name, plane(number))
    data = JUMPCellPaintingMultiView(root=str(tmp_path), pattern=pattern)
    assert len(data) == 1
    assert len(data.load_field(0).channels) == 2


def test_index_with_splits_and_pixel_size(tmp_path):
    rows = ["field,file,channel,split,pixel_size_um"]
    for field, split in (("a", "train"), ("b", "val")):
        for channel in ("DNA", "mask"):
            tifffile.imwrite(tmp_path / f"{field}{channel}.tif", plane(1))
            rows.append(f"{field},{field}{channel}.tif,{channel},{split},0.598")
    (tmp_path / "channels.csv").write_text("\n".join(rows))
    for split, names in (("TRAIN", ["a"]), ("VAL", ["b"]), ("ALL", ["a", "b"])):
        data = make_dataset(dataset_str=f"JUMPCellPaintingMultiView:root={tmp_path}:split={split}")
        assert [f.name for f in data.fields] == names
    assert data.load_field(0).channels == ("DNA",), "masks are left out"
    assert data.load_field(0).pixel_size_um == 0.598


def test_real_fields(data_dir):
    folder = data_dir / "cellpainting"
    if not folder.is_dir():
        pytest.skip("no cellpainting fields in the data folder")
    data = JUMPCellPaintingMultiView(
        root=str(folder), channels="DNA+ER+RNA+AGP+Mito", missing="skip"
    )
    assert [f.name for f in data.fields] == ["jump_A", "pediatric_BR00143976"]
    first, second = data.load_field(0), data.load_field(1)
    assert first.planes.shape == (5, 1080, 1080)
    assert "ch4" in data.fields[0].files["DNA"]
    assert "ch5" in data.fields[1].files["DNA"]
    assert len(np.unique(second.planes[0])) > 2000, "16 bits are kept"
    assert 0.02 < first.foreground.mean() < 0.9


def test_any_stack_by_configuration_alone(tmp_path):
    """A folder of RGB and near-infrared pictures: four channels, without a line of code."""
    for number in range(3):
        rgb = np.random.default_rng(number).integers(0, 256, (48, 56, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(tmp_path / f"site{number}_rgb.png")
        tifffile.imwrite(tmp_path / f"site{number}_nir.tif", plane(number, (48, 56)))
    cfg = OmegaConf.merge(
        get_default_config(),
        OmegaConf.load(Path(__file__).parents[3] / "configs" / "ssl" / "rgb_nir_multiview.yaml"),
    )
    text = cfg.train.dataset_path.replace("data/rgb_nir", str(tmp_path))
    cfg.crops.global_crops_size, cfg.crops.local_crops_size = 32, 16
    data = make_dataset(dataset_str=text, transform=build_multiview_augmentation(cfg))
    assert data.load_field(0).channels == ("nir", "rgb_0", "rgb_1", "rgb_2")
    crops, _ = data[0]
    assert crops["global_crops"][0].shape == (3, 32, 32)


def test_split_by_plate_is_stable(tmp_path):
    names = [f"plate{n}" for n in range(60)]
    rows = ["field,file,channel,plate"]
    tifffile.imwrite(tmp_path / "x.tif", plane(0))
    rows += [f"{p}_{f},x.tif,DNA,{p}" for p in names for f in range(2)]
    (tmp_path / "index.csv").write_text("\n".join(rows))
    sides = {}
    for split in ("TRAIN", "VAL"):
        data = JUMPCellPaintingMultiView(root=str(tmp_path), index="index.csv", split=split)
        sides[split] = {f.plate for f in data.fields}
    assert not sides["TRAIN"] & sides["VAL"]
    assert sides["TRAIN"] | sides["VAL"] == set(names)
    assert 1 <= len(sides["VAL"]) <= 14


# --- bad input ---


def call(folder, **options):
    return JUMPCellPaintingMultiView(root=str(folder), **options)


def test_wrong_folders_and_tables(harmony, tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a folder of fields"):
        call(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FieldError, match=r"neither the table channels.csv in .* nor `index` nor `pattern`"
    ):
        call(tmp_path / "empty")
    with pytest.raises(FieldError, match="got 0 images and no match"):
        call(tmp_path / "empty", pattern="harmony")
    with pytest.raises(FieldError, match=r"a group \(\?P<channel>"):
        call(harmony, pattern=r"\w+.tiff")
    with pytest.raises(FieldError, match="regular expression"):
        call(harmony, pattern="(?P<channel>")
    (harmony / "short.csv").write_text("number,channel\nch1,DNA\n")
    with pytest.raises(FieldError, match="must name every channel, got no row for ch2"):
        call(harmony, pattern="harmony", channels_table="short.csv")
    (harmony / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FieldError, match="must have the columns field, file, channel"):
        call(harmony, index="wrong.csv")
    with pytest.raises(FieldError, match="channels` must be among"):
        call(harmony, pattern="harmony", channels="GFP")
    with pytest.raises(ValueError, match="`missing` must be one of error, skip, allow"):
        call(harmony, pattern="harmony", missing="guess")
    with pytest.raises(ValueError, match="Percentiles must be"):
        call(harmony, pattern="harmony", percentile_low=50, percentile_high=10)


def test_two_files_of_one_channel(harmony):
    tifffile.imwrite(harmony / "P1" / "r01c01f01p01-ch1sk2fk1fl1.tiff", plane(3))
    with pytest.raises(FieldError, match="one file a channel"):
        call(harmony, pattern="harmony")


def test_missing_channel(harmony):
    (harmony / "P2" / "r01c02f01p01-ch3sk1fk1fl1.tiff").unlink()
    with pytest.raises(FieldError, match=r"got 1 without: P2/r01c02"):
        call(harmony, pattern="harmony")
    assert len(call(harmony, pattern="harmony", missing="skip")) == 3
    allowed = call(harmony, pattern="harmony", missing="allow")
    assert len(allowed) == 4
    assert allowed.load_field(3).channels == ("ch1", "ch2")
    with pytest.raises(FieldError, match=r"got 1 without: P2/r01c02"):
        call(harmony, pattern="harmony", channels="ch1+ch3")


def test_unequal_sizes_constant_planes_and_damaged_files(harmony):
    data = call(harmony, pattern="harmony")
    path = harmony / "P1" / "r01c01f01p01-ch1sk1fk1fl1.tiff"
    tifffile.imwrite(path, plane(0, (64, 81)))
    with pytest.raises(FieldError, match=r"must have one size, got ch1 \(64, 81\)"):
        data.load_field(0)
    tifffile.imwrite(path, np.zeros((64, 80), np.uint16))
    with pytest.raises(
        FieldError, match="Channel ch1 of field P1/r01c01/f01/p01 must have contrast"
    ):
        data.load_field(0)
    for content in (b"", b"II*\0 half", b"<Error/>"):
        path.write_bytes(content)
        with pytest.raises(FieldError, match=r"P1/r01c01/f01/p01 \(ch1\) must be a readable image"):
            data.load_field(0)


def test_decoding():
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((3, 4), np.complex64))
    with pytest.raises(FieldError, match="8 or 16 bits"):
        decode_planes(stream.getvalue(), "x")


# --- the field ---


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_both_tiff_decoders_agree(compression, dtype, byteorder, monkeypatch):
    """Bit for bit; what OpenCV would misread goes the other way."""
    import io

    import tifffile

    from dinov3.cells import fields

    array = np.random.default_rng(0).integers(0, 250, (70, 50)).astype(dtype)

    def encoded(pixels, **how):
        stream = io.BytesIO()
        tifffile.imwrite(
            stream, pixels, compression=compression, byteorder=byteorder, rowsperstrip=16, **how
        )
        return stream.getvalue()

    fast = fields._decode_plain_tiff(encoded(array))
    assert fast is not None
    np.testing.assert_array_equal(fast, array)
    assert fast.dtype == dtype
    data = encoded(array, photometric="minisblack")
    np.testing.assert_array_equal(decode_planes(data, "x")[0], array)
    for other in (
        encoded(np.stack([array, array])),  # two pages
        encoded(array, photometric="miniswhite"),
        encoded(np.stack([array] * 3, -1), photometric="rgb"),
        encoded(array.astype(np.int16)),
        data[: len(data) // 2],
        data[:-40],
    ):
        assert fields._decode_plain_tiff(other) is None
    assert len(decode_planes(encoded(np.stack([array, array])), "x")) == 2
    for cut in (data[: len(data) // 2], data[:10]):
        with pytest.raises(FieldError, match="must be a readable image"):
            decode_planes(cut, "x")


def test_ranges_windows_and_mean():
    a, b = plane(1), plane(2)
    a[0, 0] = 65535  # a hot pixel does not set the scale
    field = make_field("f", {"A": a, "B": b}, percentiles=(1, 99))
    assert robust_range(a, (1, 99))[1] < 4000
    low, high = field.low[0], field.high[0]
    expected = np.clip((a[5:9, 3:10].astype(float) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(field.window(0, 5, 3, 4, 7), expected, rtol=1e-5, atol=1e-6)
    mean = (field.window(0, 0, 0, 64, 80) + field.window(1, 0, 0, 64, 80)) / 2
    np.testing.assert_allclose(field.window(None, 0, 0, 64, 80), mean, rtol=1e-6)
    wider = make_field("f", {"A": a}, percentiles=(20, 80))
    assert wider.low[0] > low


def test_illumination_is_divided_out(tmp_path):
    flat = np.linspace(0.5, 1.5, 80, dtype=np.float32)[None].repeat(64, 0)
    true = plane(3, high=1000).astype(np.float32)
    seen = (true * flat).astype(np.uint16)
    np.save(tmp_path / "A.npy", flat)
    field = make_field("f", {"A": seen}, illumination={"A": flat})
    plain = make_field("f", {"A": seen})
    correlation = [
        np.corrcoef(f.window(0, 0, 0, 64, 80).ravel(), true.ravel())[0, 1] for f in (plain, field)
    ]
    assert correlation[1] > 0.995 > correlation[0]
    with pytest.raises(FieldError, match="must have an illumination image for each channel"):
        make_field("f", {"A": seen, "B": seen}, illumination={"A": flat})
    with pytest.raises(FieldError, match="positive and of its size"):
        make_field("f", {"A": seen}, illumination={"A": flat - 1})


def test_illumination_folder(harmony, tmp_path):
    folder = tmp_path / "illum"
    folder.mkdir()
    for channel in ("ch1", "ch2", "ch3"):
        np.save(folder / f"{channel}.npy", np.full((64, 80), 2.0, np.float32))
    data = call(harmony, pattern="harmony", extra=str(folder))
    assert data.load_field(0).illumination is not None
    (folder / "ch2.npy").unlink()
    with pytest.raises(FieldError, match=r"Illumination of ch2 must be a .npy array"):
        call(harmony, pattern="harmony", extra=str(folder)).load_field(0)


def test_foreground():
    image = np.full((160, 160), 100, np.uint16)
    image[:80, :80] = 3000
    image[0, 100] = 101
    field = make_field("f", {"A": image})
    assert field.foreground_share(0, 0, 80, 80) == 1.0
    assert field.foreground_share(80, 80, 80, 80) == 0.0
    assert field.foreground_share(0, 0, 160, 160) == pytest.approx(0.25)


def test_cache_has_a_limit_and_stays_in_its_process(harmony):
    data = call(harmony, pattern="harmony", cache_mb=0)
    first = data.load_field(0)
    assert data.load_field(0) is first, "the last one is always kept"
    data.load_field(1)
    assert data.load_field(0) is not first
    large = call(harmony, pattern="harmony", cache_mb=64)
    kept = large.load_field(0)
    large.load_field(1)
    assert large.load_field(0) is kept
    copy = pickle.loads(pickle.dumps(large))
    assert not copy._cache
    np.testing.assert_array_equal(copy.load_field(0).planes, kept.planes)
    assert len(call(harmony, pattern="harmony", limit=2)) == 2


# --- views ---


@pytest.fixture
def field():
    planes = {}
    for number, name in enumerate(("A", "B", "C")):
        image = np.full((300, 320), 100 + 1000 * number, np.uint16)
        image += plane(number, (300, 320), 1000)
        planes[name] = image
    return make_field("f", planes)


def augmentation(**options) -> DataAugmentationMultiView:
    settings = {
        "global_crops_size": 64, "local_crops_size": 32, "local_crops_number": 3,
        "photometrics_on": "none", "rotate": False, "zoom": (1.0, 1.0),
    }  # fmt: skip
    return DataAugmentationMultiView(**{**settings, **options})


def test_output(field):
    seed_everything(0)
    out = augmentation(gram_teacher_crops_size=96)(field)
    assert [tuple(c.shape) for c in out["global_crops"]] == [(3, 64, 64)] * 2
    assert [tuple(c.shape) for c in out["local_crops"]] == [(3, 32, 32)] * 3
    assert [tuple(c.shape) for c in out["gram_teacher_crops"]] == [(3, 96, 96)] * 2
    assert out["global_crops_teacher"] is out["global_crops"]
    assert all(c.dtype == torch.float32 for c in out["global_crops"])
    gray = out["global_crops"][0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    gray = gray + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    torch.testing.assert_close(gray[0], gray[2], atol=1e-5, rtol=0)
    assert 0 <= gray.min() <= gray.max() <= 1 + 1e-5


def views(strategy: str, **options) -> list[tuple]:
    random.seed(1)
    made = augmentation(strategy=strategy, **options)
    return [made.draw_views(5) for _ in range(300)]


def test_strategies():
    multi = views("multiview")
    assert all(sum(v is None for v in pair) == 1 for pair in multi)
    assert 100 < sum(a is None for a, _ in multi) < 200, "roles are drawn"
    assert {b for a, b in multi if a is None} == set(range(5))
    assert all(a is None for a, _ in views("multiview", random_roles=False))
    assert set(views("average")) == {(None, None)}
    single = views("single")
    assert any(a == b for a, b in single)
    assert not any(None in pair for pair in single)
    assert all(a != b and None not in (a, b) for a, b in views("pairwise"))
    assert augmentation(strategy="pairwise").draw_views(1) == (0, 0)
    for pair in views("others"):
        one, rest = sorted(pair, key=lambda view: isinstance(view, tuple))
        assert sorted([one, *rest]) == list(range(5))
    assert set(augmentation(strategy="others").draw_views(1)) == {None, 0}


def test_a_view_is_its_channel(field):
    made = augmentation()
    window = (10, 20, 64, 64)
    np.testing.assert_array_equal(made.cut(field, 1, window, 64), field.window(1, *window))
    np.testing.assert_array_equal(made.cut(field, None, window, 64), field.window(None, *window))
    without = (field.window(0, *window) + field.window(2, *window)) / 2
    np.testing.assert_allclose(made.cut(field, (0, 2), window, 64), without, atol=1e-6)
    assert made.cut(field, 0, (0, 0, 128, 128), 64).shape == (64, 64)
    halved = made.cut(field, 0, (0, 0, 128, 128), 64)
    full = field.window(0, 0, 0, 128, 128)
    np.testing.assert_allclose(halved, full.reshape(64, 2, 64, 2).mean((1, 3)), atol=1e-5)


def drawn_apart(**options) -> DataAugmentationMultiView:
    """An augmentation whose draws are given: the mean at the top left, channel 2 further down."""
    made = augmentation(**options)
    made.draw_views = lambda channels: (None, 2)
    made.draw_second_window = lambda field, first: (100, 120, 64, 64)
    honest = made.draw_window
    made.boxes = []

    def draw_window(field, size, box=None):
        if box is None:
            return 0, 0, 64, 64
        made.boxes.append(box)
        return honest(field, size, box)

    made.draw_window = draw_window
    return made


def test_each_global_crop_is_its_own_view_of_its_own_window(field):
    """The crops of the Gram teacher too."""
    made = drawn_apart(gram_teacher_crops_size=64, mean=[0] * 3, std=[1] * 3)
    expected = field.window(None, 0, 0, 64, 64), field.window(2, 100, 120, 64, 64)
    crops = made(field)
    for name in ("global_crops", "gram_teacher_crops"):
        for crop, part in zip(crops[name], expected, strict=True):
            np.testing.assert_array_equal(crop, np.stack([part] * 3))


def test_local_crops_lie_in_the_box_around_both_global_windows(field):
    made = drawn_apart(local_crops_number=4)
    made(field)
    assert made.boxes == [(0, 0, 164, 184)] * 4


def overlap(a, b) -> float:
    height = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    width = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(height, 0) * max(width, 0) / min(a[2] * a[3], b[2] * b[3])


@pytest.mark.parametrize("zoom", [(1.0, 1.0), (0.5, 1.5)])
def test_windows(field, zoom):
    random.seed(2)
    shares = {}
    for window in ("same", "overlapping", "independent"):
        made = augmentation(window=window, min_overlap=0.4, zoom=zoom)
        pairs = []
        for _ in range(200):
            first = made.draw_window(field, 64)
            second = made.draw_second_window(field, first)
            for top, left, height, width in (first, second):
                assert 0 <= top <= 300 - height
                assert 0 <= left <= 320 - width
            pairs.append(overlap(first, second))
        shares[window] = pairs
    assert min(shares["same"]) == 1
    assert min(shares["overlapping"]) >= 0.39
    assert np.mean(shares["overlapping"]) < 0.95
    assert min(shares["independent"]) == 0
    more = augmentation(window="overlapping", min_overlap=0.9, zoom=zoom)
    first = more.draw_window(field, 64)
    assert all(overlap(first, more.draw_second_window(field, first)) > 0.85 for _ in range(50))


def test_the_overlapping_window_is_drawn_from_places_inside_the_field(monkeypatch):
    """By hand: both have 64 px and share 32 rows, so the rows 4 to 36 = 100 - 64 are possible."""
    made = augmentation(window="overlapping", min_overlap=0.25, zoom=(1, 1))
    drawn = []
    monkeypatch.setattr(random, "randint", lambda first, last: drawn.append((first, last)) or last)
    assert made._overlapping((36, 36, 64, 64), 64, 100, 100) == (36, 36, 64, 64)
    assert drawn == [(4, 36), (4, 36)]


def test_both_windows_stay_within_the_zoom(field):
    """The second one is not a zoom of the first: .7 to 1.4 would become .5 to 1.95."""
    random.seed(4)
    made = augmentation(zoom=(0.7, 1.4))
    edges = []
    for _ in range(300):
        first = made.draw_window(field, 64)
        edges += [first[2], made.draw_second_window(field, first)[2]]
    assert round(0.7 * 64) <= min(edges) <= 48
    assert 86 <= max(edges) <= round(1.4 * 64)


def test_global_crops_turned_together_show_one_place_at_one_token(field):
    settings = {"rotate": True, "window": "same", "strategy": "average"}
    for seed in range(5):
        seed_everything(seed)
        first, second = augmentation(turn_together=True, **settings)(field)["global_crops"]
        assert torch.equal(first, second)
    seed_everything(3)
    first, second = augmentation(**settings)(field)["global_crops"]
    assert not torch.equal(first, second)


def test_zoom_and_pixel_size(field):
    random.seed(3)
    edges = [augmentation(zoom=(0.5, 2.0)).draw_window(field, 64)[2] for _ in range(200)]
    assert 32 <= min(edges) < 40
    assert 110 < max(edges) <= 128
    assert np.median(edges) == pytest.approx(64, abs=10), "drawn on a logarithmic scale"
    object.__setattr__(field, "pixel_size_um", 0.5)
    assert augmentation(pixel_size_um=1.0).draw_window(field, 64)[2] == 128
    assert augmentation(pixel_size_um=None).draw_window(field, 64)[2] == 64


def test_windows_look_for_cells():
    image = np.full((400, 400), 100, np.uint16)
    image[:100, :100] = 3000
    image[399, 399] = 101
    made_field = make_field("f", {"A": image})
    random.seed(4)
    shares = {}
    for tries in (1, 10):
        made = augmentation(min_foreground=0.3, foreground_tries=tries)
        windows = [made.draw_window(made_field, 64) for _ in range(100)]
        shares[tries] = np.mean([made_field.foreground_share(*w) > 0.3 for w in windows])
    assert shares[10] > shares[1] + 0.2
    always = augmentation(min_foreground=0.0, foreground_tries=10)
    assert (
        np.mean(
            [made_field.foreground_share(*always.draw_window(made_field, 64)) for _ in range(100)]
        )
        < 0.2
    )


def test_local_crops(field):
    random.seed(5)
    made = augmentation(local_crops_number=1)
    box = (100, 100, 80, 80)
    for _ in range(50):
        top, left, edge, _ = made.draw_window(field, 32, box)
        assert 100 <= top <= 180 - edge
        assert 100 <= left <= 180 - edge
    kinds = {
        v: {augmentation(local_view=v)._local_view(4) for _ in range(100)}
        for v in ("random", "mean", "single")
    }
    assert kinds["random"] == {None, 0, 1, 2, 3}
    assert kinds["mean"] == {None}
    assert kinds["single"] == {0, 1, 2, 3}
    anywhere = [augmentation(local_inside=False)(field)["local_crops"][0] for _ in range(2)]
    assert anywhere[0].shape == (3, 32, 32)


def test_symmetries():
    made = augmentation()
    image = np.arange(9.0).reshape(3, 3)
    results = {made._turned(image, turn).tobytes() for turn in range(8)}
    assert len(results) == 8
    assert made._turned(image, 0).tobytes() == image.tobytes()


def test_rotation_changes_crops(field):
    outputs = []
    for rotate in (False, True):
        seed_everything(3)
        outputs.append(augmentation(rotate=rotate, window="same", strategy="average")(field))
    plain, turned = (o["global_crops"] for o in outputs)
    assert torch.equal(plain[0], plain[1])
    assert not torch.equal(turned[0], turned[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "sideways"}, "multiview.strategy` must be one of"),
        ({"window": "none"}, "multiview.window` must be one of"),
        ({"local_view": "all"}, "multiview.local_view` must be one of"),
        ({"photometrics_on": "moon"}, "multiview.photometrics` must be one of"),
        ({"zoom": (2.0, 1.0)}, "multiview.zoom` must be"),
        ({"min_overlap": 2.0}, "multiview.min_overlap` must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        augmentation(**options)


# --- photometrics ---


def constant(**changes) -> dict[str, torch.Tensor]:
    plain = {
        "brightness": 1.0, "contrast": 1.0, "gamma": 1.0, "gauss": 0.0, "shot": 0.0, "sigma": 0.0,
        "radius": 0.0, "noise_seed": 0,
    }  # fmt: skip
    return {name: torch.tensor([value]) for name, value in {**plain, **changes}.items()}


def test_each_distortion_by_its_formula():
    x = torch.rand(1, 1, 20, 24, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    apply = FluorescencePhotometrics().apply
    torch.testing.assert_close(apply(x, constant()), x)
    torch.testing.assert_close(apply(x, constant(brightness=1.2)), x * 1.2)
    torch.testing.assert_close(apply(x, constant(gamma=1.5)), x**1.5)
    mean = x.mean()
    torch.testing.assert_close(apply(x, constant(contrast=0.5)), (x - mean) * 0.5 + mean)
    noisy = apply(x, constant(gauss=0.05))
    assert (noisy - x).std() == pytest.approx(0.05, rel=0.15)
    assert torch.equal(noisy, apply(x, constant(gauss=0.05)))
    assert not torch.equal(noisy, apply(x, constant(gauss=0.05, noise_seed=7)))
    shot = apply(x, constant(shot=0.1)) - x
    expected = 0.1 * x.sqrt()
    assert (shot / expected).std() == pytest.approx(1.0, rel=0.15)
    black = torch.zeros(1, 1, 20, 24)
    assert torch.equal(apply(black, constant(shot=0.1)), black), "shot noise grows with brightness"


def test_blur_and_defocus():
    from scipy.ndimage import gaussian_filter

    x = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    blurred = FluorescencePhotometrics().apply(x, constant(sigma=1.2))
    expected = gaussian_filter(x[0, 0].numpy(), 1.2, mode="mirror", radius=5)
    np.testing.assert_allclose(blurred[0, 0], expected, atol=2e-4)
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    disc = FluorescencePhotometrics().apply(point, constant(radius=3.0))[0, 0]
    rows, columns = np.nonzero(disc.numpy() > 1e-6)
    distance = np.hypot(rows - 15, columns - 15)
    assert distance.max() < 3.6
    assert float(disc.sum()) == pytest.approx(1, abs=1e-5)
    assert float(disc[15, 15]) == pytest.approx(float(disc[15, 17]), rel=1e-5), "flat, not a bell"


def test_draws():
    generator = torch.Generator().manual_seed(1)
    drawn = FluorescencePhotometrics(p=0.5, brightness=0.3, noise=0.1).draw(4000, generator)
    acted = drawn["brightness"] != 1
    assert acted.float().mean() == pytest.approx(0.5, abs=0.03)
    assert drawn["brightness"].log().abs().max() <= 0.3 + 1e-5
    assert 0.09 < drawn["gauss"].max() <= 0.1
    assert not ((drawn["sigma"] > 0) & (drawn["radius"] > 0)).any()
    none = FluorescencePhotometrics(p=0.0).draw(10)
    assert (none["gamma"] == 1).all()
    with pytest.raises(ValueError, match="at most 3"):
        FluorescencePhotometrics(blur_sigma=9)


@pytest.mark.parametrize(
    "name", ["brightness", "contrast", "gamma", "noise", "blur_sigma", "defocus_radius"]
)
def test_every_width_acts(name):
    results = []
    for value in (0.0, 3.0):
        widths = dict.fromkeys(
            ("brightness", "contrast", "gamma", "noise", "blur_sigma", "defocus_radius"), 0.0
        )
        made = FluorescencePhotometrics(**{**widths, name: value}, p=1.0)
        parameters = made.draw(1, torch.Generator().manual_seed(0))
        x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
        results.append(made.apply(x, parameters))
    assert not torch.allclose(results[0], results[1], atol=1e-3)


def test_device_and_worker_agree_in_distribution(field):
    """The same figures of many crops, augmented one by one or as a batch."""
    cfg = get_default_config()
    cfg.multiview.strategy = "average"
    cfg.crops.global_crops_size, cfg.crops.local_crops_size = 32, 16
    cfg.crops.local_crops_number = 1
    means, spreads = {}, {}
    for place in ("worker", "device"):
        cfg.multiview.photometrics = place
        seed_everything(1)
        made = build_multiview_augmentation(cfg)
        crops = torch.stack([made(field)["global_crops"][0] for _ in range(150)])
        if place == "device":
            assert crops.shape[1] == 1
            data = {"collated_global_crops": crops, "other": 1}
            out = photometrics_on_batch(data, cfg, torch.Generator().manual_seed(2))
            assert out["other"] == 1
            crops = out["collated_global_crops"]
        assert crops.shape[1:] == (3, 32, 32)
        means[place] = float(crops.mean())
        spreads[place] = float(crops.mean(dim=(1, 2, 3)).std())
    assert means["worker"] == pytest.approx(means["device"], abs=0.1)
    assert spreads["worker"] == pytest.approx(spreads["device"], rel=0.35)


def test_equal_seeds_equal_crops(field):
    outputs = []
    for _ in range(2):
        seed_everything(5, 17)
        outputs.append(augmentation(photometrics_on="worker", rotate=True)(field))
    for name in ("global_crops", "local_crops"):
        for a, b in zip(outputs[0][name], outputs[1][name], strict=True):
            assert torch.equal(a, b)
