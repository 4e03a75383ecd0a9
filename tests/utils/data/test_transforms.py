import random

import numpy as np
import pytest
import torch

from utils.data.transforms import (
    POLICIES,
    PRESETS,
    Augmentation,
    Mixing,
    TrainTransform,
    augmentation,
    jitter_colours,
    normalisation_tables,
    normalise,
    normalise_by_table,
    random_crop,
)
from utils.errors import UserError
from utils.spec import ModelSpec


class Factors:
    """Stands for a random generator that draws the given factors."""

    def __init__(self, *factors):
        self.factors = list(factors)

    def uniform(self, low, high):
        assert low <= self.factors[0] <= high
        return self.factors.pop(0)


def photo(channels=3, height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def spec(channels=3, **changes):
    return ModelSpec("net", 2, imgsz=16, channels=channels, **changes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_is_a_pure_function_of_image_and_seed(preset, channels):
    transform, image = TrainTransform(PRESETS[preset], spec(channels)), photo(channels)
    before, state = image.copy(), torch.get_rng_state()
    first = [transform(image, seed) for seed in range(6)]
    again = [TrainTransform(PRESETS[preset], spec(channels))(image, seed) for seed in reversed(range(6))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(out.shape == (16, 16, channels) and out.dtype == np.uint8 for out in first)
    assert (len({out.tobytes() for out in first}) == 1) == (preset == "none")
    assert np.array_equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_join_every_preset(policy):
    for preset in PRESETS:
        chosen = augmentation(preset, fliplr=None, policy=policy, erasing=1.0)
        assert chosen.policy == policy
        assert TrainTransform(chosen, spec())(photo(), 3).shape == (16, 16, 3)


def test_values_replace_those_of_the_preset_and_none_keeps_them():
    assert augmentation("default", fliplr=None) == Augmentation(jitter=0.4)
    assert augmentation("strong", fliplr=0.1, erasing=0.0) == Augmentation(jitter=0.4, policy="trivial", fliplr=0.1, erasing=0.0)
    assert augmentation("none", fliplr=0.5).fliplr == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "defualt", "fliplr": None}, ["preset 'defualt'", "Did you mean 'default'", "light", "strong"]),
        ({"preset": "light", "fliplr": None, "policy": "trival"}, ["policy 'trival'", "Did you mean 'trivial'", "rand"]),
        ({"preset": "light", "fliplr": 1.5}, ["fliplr is 1.5", "[0, 1]"]),
        ({"preset": "light", "fliplr": None, "erasing": -0.1}, ["erasing is -0.1", "[0, 1]"]),
    ],
)
def test_wrong_augmentation_names_the_value_and_the_choices(arguments, words):
    with pytest.raises(UserError) as caught:
        augmentation(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_preset_none_is_the_validation_crop():
    image = np.zeros((4, 10, 3), np.uint8)
    image[:, 3:7] = 120  # the centre square
    assert (TrainTransform(PRESETS["none"], spec())(image, 5) == 120).all()


def test_flip_mirrors_left_and_right():
    image = photo(3, 16, 16)
    flipped = TrainTransform(Augmentation(scale=None, fliplr=1.0), spec())(image, 0)
    assert np.array_equal(flipped, image[:, ::-1])
    kept = [TrainTransform(Augmentation(scale=None, fliplr=0.25), spec())(image, seed) for seed in range(400)]
    assert 60 <= sum(not np.array_equal(out, image) for out in kept) <= 140  # expected 100, standard deviation 8.7


def test_random_crop_keeps_to_area_ratio_and_image():
    draw = random.Random(0)
    for _ in range(300):
        top, left, height, width = random_crop(100, 160, (0.2, 0.5), (3 / 4, 4 / 3), draw)
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 160 - width
        assert 0.19 <= height * width / 16000 <= 0.51
        assert 0.72 <= width / height <= 1.39  # rounding to whole pixels moves the bounds a little


def test_random_crop_of_a_strip_is_its_centre_at_the_nearest_ratio():
    # 10 x 1000 at full area: no ratio in 3/4..4/3 fits, so 10 * 4 / 3 = 13 wide, left (1000 - 13) // 2 = 493
    assert random_crop(10, 1000, (1.0, 1.0), (3 / 4, 4 / 3), random.Random(0)) == (0, 493, 10, 13)
    # 1000 x 9: 9 / (3/4) = 12 high, top (1000 - 12) // 2 = 494
    assert random_crop(1000, 9, (1.0, 1.0), (3 / 4, 4 / 3), random.Random(0)) == (494, 0, 12, 9)


def test_colour_jitter_of_one_pixel_by_hand():
    image = np.full((2, 2, 3), 100, np.uint8)
    image[0, 0] = 200, 100, 50
    # brightness 1.2: (240, 120, 60), elsewhere 120; its luma 0.299 * 240 + 0.587 * 120 + 0.114 * 60 = 149.04
    # mean luma (149.04 + 3 * 120) / 4 = 127.26; contrast 0.8: 0.8 * x + 0.2 * 127.26 = (217.452, 121.452, 73.452)
    # its luma 0.8 * 149.04 + 25.452 = 144.684; saturation 1.4: 1.4 * x - 0.4 * 144.684 = (246.559, 112.159, 44.959)
    out = jitter_colours(image, 0.4, Factors(1.2, 0.8, 1.4))
    assert out[0, 0].tolist() == [247, 112, 45]
    assert out[1, 1].tolist() == [121, 121, 121]  # 0.8 * 120 + 25.452 = 121.452, grey stays grey


def test_colour_jitter_clamps_to_bytes():
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 255
    # contrast 1.4 about the mean 127.5: 0 -> -51, 255 -> 306
    assert jitter_colours(image, 0.4, Factors(1.0, 1.4, 1.0)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_colour_jitter_of_a_grey_image_by_hand():
    image = np.array([[10, 30]], np.uint8)[:, :, None]
    # brightness 1.2: 12, 36, mean 24; contrast 0.8: 0.8 * 12 + 4.8 = 14.4, 0.8 * 36 + 4.8 = 33.6
    assert jitter_colours(image, 0.4, Factors(1.2, 0.8, 1.0)).tolist() == [[[14], [34]]]


def test_dark_grey_pixels_stay_dark_under_more_contrast():
    image = np.array([[0, 200]], np.uint8)[:, :, None]
    # contrast 1.4 about the mean 100: 0 -> -40, which is black; 200 -> 240
    assert jitter_colours(image, 0.4, Factors(1.0, 1.4, 1.0)).tolist() == [[[0], [240]]]


def test_normalise_by_hand_and_channels_last():
    images = torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)  # 1.0, 0.0, 0.2
    out = normalise(images, spec(mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 0.1)))
    # (1 - 0.5) / 0.25 = 2, (0 - 0.5) / 0.5 = -1, (0.2 - 0.5) / 0.1 = -3
    assert out.shape == (1, 3, 1, 1)
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == pytest.approx([2.0, -1.0, -3.0], abs=1e-5)
    batch = torch.from_numpy(np.stack([photo(seed=i) for i in range(2)]))
    out = normalise(batch, spec())
    assert out.is_contiguous(memory_format=torch.channels_last)
    # ImageNet's red channel: (p / 255 - 0.485) / 0.229
    assert float(out[1, 0, 3, 4]) == pytest.approx((int(batch[1, 3, 4, 0]) / 255 - 0.485) / 0.229, abs=1e-5)
    assert batch.dtype == torch.uint8


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_by_table_gives_the_same_bits_in_planes(channels):
    described = spec(channels=channels, mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    values = np.arange(2 * 16 * 8 * channels, dtype=np.uint32) * 7 % 256
    images = values.astype(np.uint8).reshape(2, 16, 8, channels)
    planes = normalise_by_table(images, normalisation_tables(described))
    assert planes.flags.c_contiguous
    assert np.array_equal(planes, normalise(torch.from_numpy(images), described).numpy())


@pytest.mark.parametrize(("mixup", "cutmix"), [(-0.1, 0.0), (0.0, -0.1), (0.6, 0.5)])
def test_mixing_shares_out_of_range_are_refused(mixup, cutmix):
    with pytest.raises(UserError, match=rf"mixup {mixup} and cutmix {cutmix}.*at most 1"):
        Mixing(mixup, cutmix, 3)


def test_no_mixing_leaves_the_batch_and_the_generator_alone():
    images, labels, state = torch.rand(2, 3, 4, 4), torch.tensor([0, 2]), torch.get_rng_state()
    assert Mixing(0.0, 0.0, 3)(images, labels) == (images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    single = Mixing(1.0, 0.0, 3)(images[:1], labels[:1])
    assert torch.equal(single[0], images[:1])


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_mixed_labels_are_the_shares_of_the_mixed_images(mixup, cutmix):
    torch.manual_seed(1)
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    for _ in range(8):
        mixed, soft = Mixing(mixup, cutmix, 3)(images.clone(), torch.tensor([0, 2]))
        assert soft.shape == (2, 3)
        assert soft.sum(1).tolist() == pytest.approx([1.0, 1.0])
        assert mixed.mean((1, 2, 3)).tolist() == pytest.approx(soft[:, 2].tolist(), abs=1e-5)  # the white share is class 2's
