"""What ways back are made of: checksums, residuals, sizes and the choice between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.engine.undoing.checksum import checksum
from lorahub.engine.undoing.choice import TYPICAL, choose, held_bytes, journal_share
from lorahub.engine.undoing.memory import free_bytes, reserve
from lorahub.engine.undoing.residual import Bits, Steps, Verbatim, encode

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# --------------------------------------------------------------------------------------------------- residuals


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 3000),
    st.sampled_from([0.0, 0.0005, 0.01, 0.2, 1.0]),
    st.sampled_from([1, 100, 127, 128, 30000]),
    st.integers(0, 2**31),
)
def test_a_residual_turns_one_tensor_into_the_other_bit_for_bit(dtype, size, share, largest, seed):
    generator = torch.Generator().manual_seed(seed)
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    given_bits = torch.randint(-(2**15), 2**15, (size,), generator=generator).to(word)  # NaN, infinity and -0 too
    change = torch.randint(-largest, largest + 1, (size,), generator=generator).to(word)
    wanted_bits = given_bits + change * (torch.rand(size, generator=generator) < share)
    wanted, given_ = wanted_bits.view(dtype), given_bits.clone().view(dtype)
    residual = encode(wanted, given_)
    assert torch.equal(given_.view(word), given_bits)
    residual.apply(given_)
    assert torch.equal(given_.view(word), wanted_bits)
    assert residual.nbytes <= size * dtype.itemsize


@pytest.mark.parametrize(("share", "kind"), [(0.001, Steps), (0.05, Steps), (0.3, Bits), (1.0, Bits)])
def test_the_smallest_form_is_taken(share, kind):
    generator = torch.Generator().manual_seed(0)
    given_ = torch.randn(100_000, generator=generator).bfloat16()
    wanted = (given_.view(torch.int16) + (torch.rand(100_000, generator=generator) < share)).to(torch.int16)
    residual = encode(wanted.view(torch.bfloat16), given_)
    assert type(residual) is kind
    sizes = {Steps: share + 1 / 255, Bits: 1 / 8}
    assert residual.nbytes <= 100_000 * (share + sizes[kind]) * 1.1
    noise = torch.randint(-(2**15), 2**15, (100_000,), generator=generator).to(torch.int16)
    assert type(encode(noise.view(torch.bfloat16), given_)) is Verbatim


def test_what_lies_far_apart_and_at_the_ends_is_found_again():
    given_ = torch.zeros(200_001, dtype=torch.bfloat16)
    for places in ([0], [200_000], [0, 254, 255, 256, 511, 100_000, 200_000], [254], [255], [509, 510]):
        wanted = given_.clone()
        wanted[places] = 1.5
        restored = given_.clone()
        residual = encode(wanted, restored)
        residual.apply(restored)
        assert type(residual) is Steps
        assert torch.equal(restored, wanted)


# --------------------------------------------------------------------------------------------------- checksums


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70_000), st.integers(0, 2**31))
def test_any_flipped_bit_shows(size, seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    before = checksum(data)
    place, bit = (int(torch.randint(0, most, (), generator=generator)) for most in (size, 8))
    data[place] ^= 1 << bit
    assert not torch.equal(checksum(data), before)
    data[place] ^= 1 << bit
    assert torch.equal(checksum(data), before)


@pytest.mark.parametrize("shape", [(64, 64), (512, 300), (3000, 700), (37, 5)])
def test_exchanged_elements_rows_and_columns_show(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = checksum(tensor)
    for dim in range(2):
        turned = tensor.roll(1, dim)
        assert not torch.equal(checksum(turned), before)
        swapped = tensor.clone()
        first, last = tensor.select(dim, 0).clone(), tensor.select(dim, -1).clone()
        swapped.select(dim, 0).copy_(last)
        swapped.select(dim, -1).copy_(first)
        assert not torch.equal(checksum(swapped), before)
    assert not torch.equal(checksum(tensor[:-1]), before)


def test_strides_and_offsets_do_not_count():
    tensor = torch.randn(130, 70, generator=torch.Generator().manual_seed(0))
    expected = checksum(tensor)
    assert torch.equal(checksum(tensor.T.contiguous().T), expected)
    beside = torch.cat([torch.zeros(1, dtype=torch.uint8), bits(tensor)])[1:]
    assert torch.equal(checksum(beside), expected)
    assert torch.equal(checksum(torch.nn.Parameter(tensor)), expected)
    assert torch.equal(checksum(torch.zeros(0)), checksum(torch.zeros(0, 5).half()))


# --------------------------------------------------------------------------------------------------- sizes and choice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relative", [1e-3, 1e-2, 1e-1, 0.3])
def test_the_predicted_size_is_that_of_a_normal_change_to_normal_weights(dtype, relative):
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(512, 512, generator=generator) * 0.02).to(dtype)
    change = torch.randn(512, 16, generator=generator).double() @ torch.randn(16, 512, generator=generator).double()
    change *= relative * weights.double().norm() / change.norm()
    back = ((weights.double() + change).to(dtype).double() - change).to(dtype)
    taken = encode(weights, back).nbytes / weights.numel() / dtype.itemsize
    assert journal_share(relative, dtype.itemsize) == pytest.approx(taken, rel=0.3)


@pytest.mark.parametrize(
    ("needs", "rooms", "chosen"),
    [
        ({"copy": 10, "journal": 1}, {"copy": 20, "journal": 20}, "copy"),
        ({"copy": 11, "journal": 1}, {"copy": 20, "journal": 20}, "journal"),
        ({"copy": 11, "journal": 11, "host": 11}, {"copy": 20, "journal": 20, "host": 99}, "host"),
        ({"copy": 11, "journal": 11, "host": 11, "reload": 0}, {"copy": 2, "journal": 2, "host": 2}, "reload"),
        ({"copy": 50, "journal": 9}, {"copy": 2, "journal": 2}, "journal"),  # least, where nothing fits
        ({"copy": 50, "journal": 9}, {}, "copy"),  # where nobody knows
    ],
)
def test_the_fastest_way_that_leaves_half_of_the_free_memory_is_chosen(needs, rooms, chosen):
    assert choose(needs, rooms) == chosen


def test_a_plan_says_what_undo_would_hold(tools):
    world = tools.World({"a.weight": tools.weights(2048, 2048), "b.weight": tools.weights(64, 64)})
    adapter = {"a.weight": tools.lora(2048, 2048, dtype=torch.bfloat16), "b.weight": tools.lora(64, 64, r=32)}
    plan = world.plan(adapter)
    copies = held_bytes(plan.steps, "copy")
    journal = held_bytes(plan.steps, "journal")
    assert copies == held_bytes(plan.steps, "host") == 2048 * 2048 * 2 + 64 * 64 * 2
    # the factors of b take more than its copy, so it is copied
    assert journal == pytest.approx(journal_share(TYPICAL, 2) * 2048 * 2048 * 2 + 64 * 64 * 2, abs=1)
    assert held_bytes(plan.steps, "journal", {"a.weight": 0.9, "b.weight": 0.9}) == copies
    assert held_bytes(plan.steps, "reload") == held_bytes(plan.steps, "none") == 0
    peaks = {undo: plan.peak_bytes(streamed=False, undo=undo) for undo in ("copy", "journal", "reload")}
    assert peaks["copy"] - peaks["journal"] == copies - journal
    assert peaks["copy"] - peaks["reload"] == copies
    assert "undo       copies take 8.4 MB; a journal about 663 kB, where changes are small" in plan.explain()


def test_memory_is_reserved_in_the_shape_of_what_is_copied():
    large = torch.randn(1024, 3, 1024).bfloat16().transpose(0, 2)
    for like in (large, torch.zeros(3), torch.zeros(0, 4)):
        space = reserve(like, torch.device("cpu"))
        assert (space.shape, space.dtype, space.is_contiguous()) == (like.shape, like.dtype, True)
        assert torch.equal(space.copy_(like), like)
    room = free_bytes(torch.device("cpu"))
    assert room is None or room > 1 << 20
    assert free_bytes(torch.device("meta")) is None
