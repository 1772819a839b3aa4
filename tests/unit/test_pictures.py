"""Pictures: what is drawn where, that nothing foreign gets through, and that the same numbers give the same bytes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub.pictures.colours import STEPS_256, STOPS, at, at_256, from_256, hexadecimal, ink_on
from lorahub.pictures.grid import Place, arrange
from lorahub.pictures.heat_map import HeatMap, svg
from lorahub.pictures.scale import Scale, label, number, shortened
from lorahub.pictures.terminal import lines

SVG = "{http://www.w3.org/2000/svg}"
TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def table(count: int, across: int = 3, **more: object) -> HeatMap:
    names = [f"layers.{row}" for row in range(count)]
    targets = [TARGETS[column] if column < 3 else f"target_{column}" for column in range(across)]
    values = {
        (row, target): (number + 1) * (at_column + 1) / count
        for number, row in enumerate(names)
        for at_column, target in enumerate(targets)
    }
    fields = {"title": "ink", "rows": names, "columns": targets, "values": values, "measure": "norm"} | more
    return HeatMap(**fields)  # type: ignore[arg-type]


def drawn(picture: HeatMap) -> ET.Element:
    return ET.fromstring(svg(picture))


def cells(root: ET.Element) -> list[ET.Element]:
    return [each for each in root.iter(f"{SVG}rect") if each.find(f"{SVG}title") is not None]


# ---------------------------------------------------------------------------------------------------- SVG


@pytest.mark.parametrize("rows", [1, 2, 12, 48, 120])
def test_every_number_has_one_cell_inside_the_page_and_none_lies_over_another(rows: int) -> None:
    root = drawn(table(rows, 5))
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    boxes = [tuple(float(each.get(key, "")) for key in ("x", "y", "width", "height")) for each in cells(root)]
    assert len(boxes) == rows * 5
    assert all(x > 0 and x + w < width and y > 0 and y + h < height for x, y, w, h in boxes)
    assert len({(x, y) for x, y, _, _ in boxes}) == len(boxes)
    steps = sorted({y for _, y, _, _ in boxes})
    assert all(below - above >= boxes[0][3] - 0.11 for above, below in pairwise(steps))


@pytest.mark.parametrize("rows", [2, 32, 120])
def test_every_layer_is_labelled_within_the_page_and_labels_do_not_touch(rows: int) -> None:
    root = drawn(table(rows))
    said = {each.text: each for each in root.iter(f"{SVG}text")}
    labels = [said[f"layers.{row}"] for row in range(rows)]
    size = float(labels[0].get("font-size", ""))
    heights = [float(each.get("y", "")) for each in labels]
    assert size >= 8
    assert all(below - above >= size for above, below in pairwise(heights))
    assert all(float(each.get("x", "")) - len(each.text or "") * 0.57 * size > 20 for each in labels)
    assert {"ink", "layer", "target", *TARGETS} <= set(said)
    assert ("norm, log scale" if rows > 100 else "norm") in said  # over two decades


def test_the_scale_is_drawn_with_numbers_from_the_least_to_the_greatest() -> None:
    picture = table(4)
    said = [each.text for each in drawn(picture).iter(f"{SVG}text")]
    assert all(number(value) in said for _, value in picture.scale.ticks())
    stops = list(drawn(picture).iter(f"{SVG}stop"))
    assert [each.get("stop-color") for each in stops] == [hexadecimal(colour) for colour in STOPS]


def test_colours_follow_the_numbers() -> None:
    root = drawn(table(1, 3, values={("layers.0", TARGETS[0]): 0.0, ("layers.0", TARGETS[2]): 2.0}))
    assert [each.get("fill") for each in cells(root)] == [hexadecimal(STOPS[0]), hexadecimal(STOPS[-1])]
    assert len([each for each in root.iter(f"{SVG}rect") if each.get("class") == "none"]) == 1


def test_numbers_are_written_into_cells_that_have_room_and_every_cell_says_its_own() -> None:
    wide, tall = drawn(table(4)), drawn(table(120))
    assert "0.25" in [each.text for each in wide.iter(f"{SVG}text")]
    assert len(list(tall.iter(f"{SVG}text"))) < 120 + 20
    assert "layers.0, self_attn.q_proj: 0.25" in [each.findtext(f"{SVG}title") for each in cells(wide)]


def test_foreign_text_stays_text() -> None:
    hostile = '</text><script>alert("x")</script>&\x1b[31m\u202e'
    root = drawn(table(2, 1, title=hostile, subtitle=hostile, measure=hostile, columns=[hostile], row_title=hostile))
    assert not [each for each in root.iter() if "script" in each.tag]
    text = svg(table(2, title=hostile))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<script" not in text


def test_nothing_is_loaded_and_nothing_runs() -> None:
    text = svg(table(3))
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"href|@import|@font-face|<script|\son\w+=", text)
    assert "prefers-color-scheme:dark" in text


def test_the_same_numbers_give_the_same_bytes_in_every_process() -> None:
    code = (
        "from lorahub.pictures.heat_map import HeatMap, svg;"
        "import sys;"
        "values = {('a', 'c'): 1 / 3, ('b', 'c'): 2.5};"
        "p = HeatMap(title='t', rows=['a', 'b'], columns=['c'], values=values, measure='m');"
        "sys.stdout.write(svg(p))"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outs) == 1


def test_long_names_are_cut_in_the_middle_and_the_page_grows_with_the_title() -> None:
    name = "down_blocks.0.attentions.1.transformer_blocks.0.and.more.that.no.page.has.room.for"
    root = drawn(table(1, 1, rows=[name], values={(name, TARGETS[0]): 1.0}, title="x" * 150))
    said = [each.text or "" for each in root.iter(f"{SVG}text")]
    (short,) = [text for text in said if "\u2026" in text]
    assert len(short) == 44
    assert short.startswith("down_blocks")
    assert short.endswith("for")
    assert float(root.get("width", "")) > 150 * 16 * 0.5


def test_an_empty_picture_is_still_one() -> None:
    assert cells(drawn(HeatMap(title="nothing", rows=[], columns=[], measure="norm"))) == []
    assert lines(HeatMap(title="nothing", rows=[], columns=[], measure="norm"), width=80, colour=False)


# ------------------------------------------------------------------------------------------------- terminal


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("columns", [1, 3, 30])
@pytest.mark.parametrize("colour", [True, False])
def test_lines_fit_the_width_and_every_layer_has_one(width: int, columns: int, colour: bool) -> None:
    found = lines(table(12, columns), width=width, colour=colour)
    plain = [ESCAPE.sub("", line) for line in found]
    assert [line for line in plain if len(line) > width] == []
    tables = sum(line.startswith(shortened("layers.11", max(width // 2 - 4, 8))) for line in plain)
    assert 1 <= tables <= columns


def test_without_colour_there_is_no_escape_and_heights_follow_the_numbers() -> None:
    found = lines(table(8, 1), width=60, colour=False)
    assert not any("\x1b" in line for line in found)
    blocks = [line.split()[1] for line in found if line.startswith("layers.")]
    assert blocks == sorted(blocks)
    assert blocks[-1] == "\u2588"


def test_with_colour_every_cell_is_closed_again() -> None:
    found = lines(table(3), width=80, colour=True)
    assert sum(line.count("\x1b[48;5;") for line in found) == sum(line.count("\x1b[0m") for line in found)


def test_names_that_do_not_fit_become_letters_that_are_explained() -> None:
    text = "\n".join(lines(table(2, 12), width=60, colour=False))
    assert "a self_attn.q_proj" in text
    assert "l target_11" in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    name = "x" * 90
    picture = table(2, 2, rows=[name, "caf\u00e9"], values={(name, TARGETS[0]): 1.0})
    assert all(line.isascii() for line in lines(picture, width=60, colour=False, unicode=False))


def test_hostile_labels_cannot_drive_the_terminal() -> None:
    bad = "layers\x1b]0;owned\x07\r.0\x9b31m"
    found = lines(table(1, 1, rows=[bad], columns=[bad], values={(bad, bad): 1.0}, title=bad), width=80, colour=False)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(found))


# --------------------------------------------------------------------------------------- scale and colours


def test_a_scale_starts_at_zero_and_turns_logarithmic_over_two_decades() -> None:
    assert Scale.of([1.0, 2.0]) == Scale(low=0.0, high=2.0)
    wide = Scale.of([0.001, 1.0])
    assert wide.logarithmic
    assert wide.share(math.sqrt(0.001)) == pytest.approx(0.5)
    assert Scale.of([1e-12, 1.0]).low == 1e-4
    assert Scale.of([-1.0, 1.0]).share(0.0) == 0.5
    assert Scale.of([0.001, 1.0], low=0.0, high=1.0) == Scale(low=0.0, high=1.0)
    assert Scale.of([0.0, 0.0]).share(0.0) == 0.0
    assert Scale.of([math.nan, math.inf, 3.0]).high == 3.0


def lightness(colour: tuple[int, int, int]) -> float:
    """L of OKLab, by the matrices of its author's page."""
    linear = [math.pow((part / 255 + 0.055) / 1.055, 2.4) if part > 10 else part / 255 / 12.92 for part in colour]
    mixed = (
        0.4122214708 * linear[0] + 0.5363325363 * linear[1] + 0.0514459929 * linear[2],
        0.2119034982 * linear[0] + 0.6806995451 * linear[1] + 0.1073969566 * linear[2],
        0.0883024619 * linear[0] + 0.2817188376 * linear[1] + 0.6299787005 * linear[2],
    )
    long, middle, short = (math.cbrt(part) for part in mixed)
    return 0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short


def test_lightness_rises_evenly_over_the_scale() -> None:
    steps = [lightness(at(step / 20)) for step in range(21)]
    rises = [after - before for before, after in pairwise(steps)]
    assert min(rises) > 0
    assert max(rises) < 2 * sum(rises) / len(rises)
    assert steps[-1] - steps[0] > 0.55


def contrast(colour: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(one: tuple[int, int, int]) -> float:
        parts = [(part / 255 + 0.055) / 1.055 for part in one]
        red, green, blue = (math.pow(part, 2.4) if part > 0.09 else part / 12.92 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted([luminance(colour), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_numbers_can_be_read_on_every_colour() -> None:
    for step in range(101):
        colour = at(step / 100)
        ink = ink_on(colour)
        written = tuple(int(ink[start : start + 2], 16) for start in (1, 3, 5))
        assert contrast(colour, written) > 4  # type: ignore[arg-type]


def test_lightness_rises_over_the_256_colours_and_numbers_can_be_read_on_them() -> None:
    shades = [from_256(shade) for shade in STEPS_256]
    assert all(lightness(below) < lightness(above) for below, above in pairwise(shades))
    for shade in shades:
        ink = (255, 255, 255) if ink_on(shade) == "#ffffff" else (0, 0, 0)
        assert contrast(shade, ink) > 4
    assert [at_256(share) for share in (-1.0, 0.0, 0.999, 1.0, 2.0)] == [17, 17, 227, 227, 227]
    assert from_256(16) == (0, 0, 0)
    assert from_256(231) == (255, 255, 255)
    assert from_256(221) == (255, 215, 95)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.123456, "0.12"),
        (1.0, "1"),
        (12.34, "12"),
        (123.4, "123"),
        (5000.0, "5000"),
        (1e-5, "1e-05"),
        (123456.0, "1e+05"),
        (0.0996, "0.1"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@given(st.text(max_size=60), st.integers(min_value=1, max_value=40))
def test_labels_are_short_and_printable_whatever_they_were(text: str, room: int) -> None:
    shown = shortened(label(text), room)
    assert len(shown) <= max(room, 1)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e]", shown)


# --------------------------------------------------------------------------------------------------- grid


def test_layers_are_rows_and_places_are_columns() -> None:
    names = [f"model.layers.{layer}.{place}" for layer in range(3) for place in ("self_attn.q_proj", "mlp.up_proj")]
    found = arrange([*names, "lm_head"])
    assert found["model.layers.2.self_attn.q_proj"] == Place("layers.2", "self_attn.q_proj")
    assert found["model.layers.0.mlp.up_proj"] == Place("layers.0", "mlp.up_proj")
    assert found["lm_head"] == Place("(whole)", "lm_head")


def test_numbers_that_count_no_blocks_stay_in_the_column() -> None:
    places = ("attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    names = [f"down_blocks.{b}.attentions.{a}.transformer_blocks.0.{p}" for b in (0, 1) for a in (0, 1) for p in places]
    found = arrange(names)
    assert {each.column for each in found.values()} == {"to_out.0", "net.0.proj", "ff.net.2"}
    assert len({each.row for each in found.values()}) == 4


def test_flattened_names_are_taken_apart_at_their_numbers() -> None:
    stages = ("input_blocks_4_1", "input_blocks_7_1", "middle_block_1")
    names = [f"{stage}_transformer_blocks_{n}_attn1_to_q" for stage in stages for n in range(2)]
    found = arrange([*names, *(f"{stage}_proj_in" for stage in stages)])
    assert found["middle_block_1_transformer_blocks_1_attn1_to_q"] == Place(
        "middle_block.1.transformer_blocks.1", "attn1_to_q"
    )
    assert found["middle_block_1_proj_in"] == Place("middle_block.1", "proj_in")
    assert found["input_blocks_4_1_proj_in"] == Place("input_blocks.4.1", "proj_in")


def test_a_component_in_front_of_flattened_names_changes_nothing() -> None:
    names = [f"text_encoder.text_model_encoder_layers_{layer}_mlp_fc1" for layer in range(3)]
    assert arrange(names)[names[2]] == Place("text_model_encoder_layers.2", "mlp_fc1")
    both = arrange([*names, *(f"unet.down_blocks_{block}_proj_in" for block in range(2))])
    assert both[names[0]] == Place("text_encoder.text_model_encoder_layers.0", "mlp_fc1")
    assert both["unet.down_blocks_1_proj_in"] == Place("unet.down_blocks.1", "proj_in")


def test_a_lone_block_is_a_row_where_its_places_are_known_from_others() -> None:
    names = [f"up_blocks.{n}.attentions.{a}.to_q" for n in range(2) for a in range(2)] + ["mid_block.attentions.0.to_q"]
    assert arrange(names)["mid_block.attentions.0.to_q"] == Place("mid_block.attentions.0", "to_q")


@given(
    st.lists(
        st.lists(
            st.sampled_from(["layers", "0", "1", "12", "attn", "q", "net", "to_out", "_", "a_0_b"]),
            min_size=1,
            max_size=6,
        ),
        min_size=1,
        max_size=25,
    )
)
def test_no_two_names_share_a_place_and_none_is_lost(parts: list[list[str]]) -> None:
    names = [".".join(each) for each in parts]
    found = arrange(names)
    assert found.keys() == set(names)
    assert len(set(found.values())) == len(found)
    assert all(place.row and place.column for place in found.values())
