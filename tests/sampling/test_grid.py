"""Contact sheets: size, placement, enlargement."""

import numpy as np
import pytest
from PIL import Image

from dedistill.sampling.images import SHORT_SIDE, contact_sheet, integer_scale


def flat(colour, size=(8, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def count(sheet, colour):
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


@pytest.mark.parametrize(("size", "scale"), [((8, 16), 8), ((32, 32), 2), ((28, 28), 3), ((64, 96), 1), ((512, 512), 1)])
def test_tiny_images_are_enlarged_by_a_whole_factor(size, scale):
    assert integer_scale(*size) == scale
    assert min(size) * scale >= SHORT_SIDE


def test_every_image_is_there_at_the_chosen_scale():
    red, blue = flat((255, 0, 0)), flat((0, 0, 255))
    sheet = contact_sheet([("3 seven", [red, blue]), ("4 eight", [blue, blue])], ["CFG 1", "CFG 2"], title="t", scale=3)
    assert sheet.mode == "RGB"
    assert count(sheet, (255, 0, 0)) == 8 * 16 * 9
    assert count(sheet, (0, 0, 255)) == 3 * 8 * 16 * 9
    assert sheet.height > 2 * 16 * 3


def test_scale_is_chosen_when_not_given():
    sheet = contact_sheet([("a", [flat((255, 0, 0))])], ["CFG 1"], title="t", scale=None)
    assert count(sheet, (255, 0, 0)) == 64 * 128


def test_columns_follow_their_order_and_pixels_stay_hard():
    image = Image.fromarray(np.array([[255, 0], [0, 255]], np.uint8)).convert("RGB")
    sheet = np.asarray(contact_sheet([("", [flat((255, 0, 0), (2, 2)), image])], ["", ""], title="", scale=None))
    reds = np.where((sheet == (255, 0, 0)).all(axis=-1))
    blacks = np.where((sheet == 0).all(axis=-1))
    assert reds[1].max() < blacks[1].min()
    assert len(blacks[0]) == 2 * 32 * 32  # no smoothing: no grey between the squares


def test_grey_images_and_missing_ones():
    grey = flat(7, mode="L")
    sheet = contact_sheet([("a", [grey, None])], ["1", "2"], title="t", scale=4)
    assert count(sheet, (7, 7, 7)) == 8 * 16 * 16
    assert count(sheet, (238, 238, 236)) == 8 * 16 * 16


def test_a_long_prompt_does_not_widen_the_sheet_without_bound():
    short = contact_sheet([("word " * 6, [flat(0)])], ["1"], title="t", scale=4)
    long = contact_sheet([("word " * 400 + "x" * 900, [flat(0)])], ["1"], title="t", scale=4)
    assert long.width <= short.width + 40
    assert long.height <= short.height + 60


def test_a_long_title_and_wide_column_names_fit():
    title = "a title much wider than one column of tiny images would ever be"
    sheet = np.asarray(contact_sheet([("a", [flat(0)])], ["a wide column name"], title=title, scale=1))
    assert (sheet[:, -8:] == 255).all()  # nothing is cut off at the right edge


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="2 columns"):
        contact_sheet([("a", [flat(0)])], ["1", "2"], title="t", scale=1)
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([("a", [None])], ["1"], title="t", scale=1)
