"""Crops of `DataAugmentationDINO`: what comes out, how often it is distorted, what each option does."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.data import DataAugmentationDINO, augmentations
from dinov3.data.loaders import seeded
from dinov3.data.transforms import make_base_transform


@pytest.fixture(autouse=True)
def _seeds():
    with seeded("test"):
        yield


def image(size: int = 48) -> Image.Image:
    rng = np.random.default_rng(3)
    return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))


def make(**changes) -> DataAugmentationDINO:
    options = {
        "global_crops_scale": (0.32, 1.0),
        "local_crops_scale": (0.05, 0.32),
        "local_crops_number": 4,
        "global_crops_size": 32,
        "local_crops_size": 16,
        "patch_size": 8,
    }
    return DataAugmentationDINO(**(options | changes))


def plain(**changes) -> DataAugmentationDINO:
    """Without any distortion of values."""
    made = make(**changes)
    made.distort = (lambda x: x, lambda x: x)
    made.distort_local = lambda x: x
    return made


def crops(made: DataAugmentationDINO, place: object = 0, size: int = 48):
    with seeded(place):
        return made(image(size))


def test_output():
    output = crops(make())
    assert set(output) == {
        "weak_flag",
        "global_crops",
        "global_crops_teacher",
        "local_crops",
        "offsets",
    }
    assert output["weak_flag"] is True
    assert output["offsets"] == ()
    assert [tuple(crop.shape) for crop in output["global_crops"]] == [(3, 32, 32)] * 2
    assert [tuple(crop.shape) for crop in output["local_crops"]] == [(3, 16, 16)] * 4
    for name in ("global_crops", "global_crops_teacher", "local_crops"):
        assert all(crop.dtype == torch.float32 for crop in output[name])
    assert all(
        torch.equal(a, b)
        for a, b in zip(output["global_crops"], output["global_crops_teacher"], strict=True)
    )
    every = [*output["global_crops"], *output["local_crops"]]
    assert len({crop.numpy().tobytes() for crop in every}) == 6


def test_equal_seeds_give_equal_crops():
    one, two, other = crops(make(), 1), crops(make(), 1), crops(make(), 2)
    assert all(
        torch.equal(a, b) for a, b in zip(one["local_crops"], two["local_crops"], strict=True)
    )
    assert not torch.equal(one["global_crops"][0], other["global_crops"][0])


def test_every_kind_of_image():
    array = np.asarray(image())
    kinds = [image(), array, torch.from_numpy(array.copy()).permute(2, 0, 1), array / 255]
    results = []
    for kind in kinds:
        with seeded(1):
            results.append(make()(kind)["global_crops"][1])
    assert all(torch.equal(result, results[0]) for result in results)


class Record:
    """Counts where each distortion acts: crops are made in the order global 1, global 2, locals."""

    def __init__(self, monkeypatch):
        self.count = defaultdict(int)
        self.sigmas = []
        record = self

        def watch(name, changed):
            original = getattr(augmentations, name)

            class Watched(original):
                def __call__(self, value):
                    result = super().__call__(value)
                    record.count[name, changed(self, value, result)] += 1
                    return result

            monkeypatch.setattr(augmentations, name, Watched)

        for name in ("ColorJitter", "RandomGrayscale", "RandomSolarize", "GaussianBlur"):
            watch(name, lambda _self, value, result: result is not value)

    def rate(self, name: str) -> float:
        return self.count[name, True] / max(self.total(name), 1)

    def total(self, name: str) -> int:
        return self.count[name, True] + self.count[name, False]


@pytest.mark.parametrize(
    ("which", "blur", "solarise"),
    [("first", 0.0, None), ("second", 0.9, 0.2), ("local", 0.5, None)],
)
def test_rates_of_the_distortions(monkeypatch, which, blur, solarise):
    record = Record(monkeypatch)
    made = make()
    distort = {"first": made.distort[0], "second": made.distort[1], "local": made.distort_local}
    source = image(4)
    for _ in range(1500):
        distort[which](source)
    assert abs(record.rate("ColorJitter") - 0.8) < 0.05
    assert abs(record.rate("RandomGrayscale") - 0.2) < 0.05
    assert abs(record.rate("GaussianBlur") - blur) < 0.05
    assert record.total("GaussianBlur") == 1500
    if solarise is None:
        assert record.total("RandomSolarize") == 0
    else:
        assert abs(record.rate("RandomSolarize") - solarise) < 0.05


def test_shared_jitter_is_drawn_once_an_image(monkeypatch):
    record = Record(monkeypatch)
    made = make(share_color_jitter=True)
    for _ in range(20):
        made(image())
    assert record.total("ColorJitter") == record.total("RandomGrayscale") == 20
    assert record.total("GaussianBlur") == 20 * 6
    monkeypatch.undo()
    record = Record(monkeypatch)
    make()(image())
    assert record.total("ColorJitter") == 6


def test_scales_act():
    """The detail of a crop tells how much it was enlarged or shrunk."""

    def detail(**changes) -> float:
        made = plain(horizontal_flips=False, **changes)
        outputs = [crops(made, i) for i in range(8)]
        return float(np.mean([o["global_crops"][0].diff(dim=-1).abs().mean() for o in outputs]))

    assert detail(global_crops_scale=(0.02, 0.03)) < 0.5 * detail(global_crops_scale=(0.9, 1.0))
    small = plain(local_crops_scale=(0.01, 0.02), local_crops_size=32)
    large = plain(local_crops_scale=(0.9, 1.0), local_crops_size=32)
    fine = [crops(m)["local_crops"][0].diff(dim=-1).abs().mean() for m in (small, large)]
    assert fine[0] < 0.5 * fine[1]


def test_numbers_and_sizes_act():
    output = crops(make(local_crops_number=3, global_crops_size=40, local_crops_size=24))
    assert [crop.shape[-1] for crop in output["global_crops"]] == [40, 40]
    assert [crop.shape[-1] for crop in output["local_crops"]] == [24, 24, 24]


def test_flips_act():
    bright_left = Image.fromarray(
        np.repeat(np.linspace(255, 0, 48).astype(np.uint8)[None, :, None], 48, 0).repeat(3, 2)
    )

    def share_of_flipped(**changes) -> float:
        made = plain(**changes)
        outputs = [made(bright_left) for _ in range(60)]
        every = [c for o in outputs for c in [*o["global_crops"], *o["local_crops"]]]
        return float(np.mean([bool(c[0, :, 0].mean() < c[0, :, -1].mean()) for c in every]))

    assert share_of_flipped(horizontal_flips=False) == 0
    assert abs(share_of_flipped() - 0.5) < 0.12


def test_mean_and_std_act():
    with seeded(0):
        usual = make()(image())["global_crops"][0]
    with seeded(0):
        bare = make(mean=(0.0,) * 3, std=(1.0,) * 3)(image())["global_crops"][0]
    assert bare.min() >= 0
    assert bare.max() <= 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close((bare - mean[:, None, None]) / std[:, None, None], usual)


def test_teacher_without_distortions():
    output = crops(make(teacher_no_color_jitter=True))
    undistorted = crops(plain(teacher_no_color_jitter=True))["global_crops"]
    assert torch.equal(output["global_crops_teacher"][0], undistorted[0])
    assert not torch.equal(output["global_crops_teacher"][1], output["global_crops"][1])


def test_gram_crops_show_the_window_of_the_global_crops():
    output = crops(plain(gram_teacher_crops_size=64), size=96)
    for large, small in zip(output["gram_teacher_crops"], output["global_crops"], strict=True):
        assert large.shape == (3, 64, 64)
        halved = torch.nn.functional.interpolate(
            large[None], size=(32, 32), mode="bicubic", antialias=True, align_corners=False
        )[0]
        torch.testing.assert_close(halved, small)
    assert "gram_teacher_crops" not in crops(make())


def test_gram_crops_without_distortions():
    clean = crops(plain(gram_teacher_crops_size=64), size=96)["gram_teacher_crops"]
    distorted = crops(make(gram_teacher_crops_size=64), size=96)["gram_teacher_crops"]
    spared = crops(make(gram_teacher_crops_size=64, gram_teacher_no_distortions=True), size=96)[
        "gram_teacher_crops"
    ]
    # The first crop's window is drawn before anything else.
    assert torch.equal(spared[0], clean[0])
    assert not torch.equal(distorted[1], spared[1])


def test_blur_has_its_usual_scale_when_gram_crops_are_spared(monkeypatch):
    sizes = []
    original = augmentations.GaussianBlur.apply
    monkeypatch.setattr(
        augmentations.GaussianBlur,
        "apply",
        lambda self, picture, sigma: (
            sizes.append(picture.size[0]) or original(self, picture, sigma)
        ),
    )
    crops(make(gram_teacher_crops_size=64, gram_teacher_no_distortions=True))
    assert sizes == [32, 32, 16, 16, 16, 16]
    sizes.clear()
    crops(make(gram_teacher_crops_size=64))
    assert sizes == [64, 64, 16, 16, 16, 16]


@pytest.mark.parametrize("number", [4, 5])
def test_local_crops_lie_in_their_global_crop(number):
    made = plain(
        local_crops_subset_of_global_crops=True, local_crops_number=number, global_crops_size=64
    )
    rows = set()
    for place in range(12):
        output = crops(made, place)
        assert len(output["local_crops"]) == len(output["offsets"]) == number
        pairs = zip(output["local_crops"], output["offsets"], strict=True)
        for index, (crop, (row, column)) in enumerate(pairs):
            whole = output["global_crops"][0 if index < number // 2 else 1]
            assert row % 8 == column % 8 == 0
            assert torch.equal(crop, whole[:, row : row + 16, column : column + 16])
            rows.add(row)
    assert rows == {0, 8, 16, 24, 32, 40}  # upstream leaves the last place out, and so do we


def test_patch_size_sets_the_grid_of_those_places():
    made = plain(local_crops_subset_of_global_crops=True, global_crops_size=64, patch_size=16)
    offsets = [offset for place in range(12) for offset in crops(made, place)["offsets"]]
    assert {row for row, _ in offsets} == {0, 16, 32}


def test_local_crops_of_a_global_crop_get_their_own_distortion():
    made = make(local_crops_subset_of_global_crops=True, local_crops_size=32)
    output = crops(made)  # no room to move: only the distortions differ
    assert output["offsets"] == [(0, 0)] * 4
    assert len({crop.numpy().tobytes() for crop in output["local_crops"]}) == 4


def test_distortions_act_on_eight_bits_and_then_normalise():
    made = plain(global_crops_scale=(1.0, 1.0), global_crops_size=48, horizontal_flips=False)
    # A window of the whole square image fits only at aspect 1, so it is the whole image.
    assert torch.equal(crops(made)["global_crops"][0], make_base_transform()(image()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_crops_size": 0}, "global_crops_size` must be at least 1, got 0"),
        ({"local_crops_number": 0}, "local_crops_number` must be at least 1, got 0"),
        ({"global_crops_scale": (0.5, 0.2)}, "0 < low <= high <= 1, got 0.5 and 0.2"),
        ({"local_crops_scale": (0.0, 0.2)}, "0 < low <= high <= 1, got 0.0 and 0.2"),
        (
            {"local_crops_subset_of_global_crops": True, "local_crops_size": 40},
            "must not be larger, got 40 and 32",
        ),
    ],
)
def test_impossible_options(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
