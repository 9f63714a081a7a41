from __future__ import annotations

import pytest
import torch

from pab_kernels.models.demo import shapes
from pab_kernels.models.demo.shapes import Caption, parse


def test_the_checker_reads_every_drawn_caption():
    captions = shapes.captions()
    clips = shapes.render_batch(captions, torch.Generator().manual_seed(3))
    assert [shapes.read_clip(clip) for clip in clips] == captions


def test_the_checker_reads_through_weak_noise():
    generator = torch.Generator().manual_seed(4)
    captions = shapes.held_out(30)
    clips = shapes.render_batch(captions, generator)
    noisy = clips + 0.05 * torch.randn(clips.shape, generator=generator)
    assert [shapes.read_clip(clip) for clip in noisy] == captions


def test_a_plain_clip_shows_a_background_only():
    clip = torch.tensor(shapes.BACKGROUNDS["dawn"])[None, :, None, None].expand(
        shapes.FRAMES, 3, shapes.SIZE, shapes.SIZE
    )
    assert shapes.read_clip(clip) == Caption(background="dawn")


def test_a_clip_played_backwards_moves_the_other_way():
    caption = Caption("red", "bar", "left", "day")
    clip = shapes.render(caption, torch.Generator().manual_seed(0))
    assert shapes.read_clip(clip.flip(0)) == Caption("red", "bar", "right", "day")


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_shape_keeps_its_pixels_as_it_moves(shape: str):
    clip = shapes.render(Caption("red", shape, "right", "day"), torch.Generator().manual_seed(0))
    assert torch.equal(clip[1:, ..., shapes.SPEED :], clip[:-1, ..., : -shapes.SPEED])


def test_a_still_clip_has_no_direction():
    clip = shapes.render(Caption("red", "circle", "up", "night"), torch.Generator().manual_seed(0))
    assert shapes.read_clip(clip[:1].expand(shapes.FRAMES, -1, -1, -1)).direction is None


def test_held_out_captions_are_complete_distinct_and_always_the_same():
    held = shapes.held_out()
    assert held == shapes.held_out() and len(set(held)) == 100
    assert set(held) < set(shapes.captions())
    assert all(len(caption.words()) == len(shapes.VOCABULARY) for caption in held)
    assert Caption("red", "circle", "right", "night") in held  # the documentation's example
    assert str(held[0]) == "a blue column moves left at dawn"


def test_training_never_draws_a_held_out_caption():
    pool = set(shapes.captions()) - set(shapes.held_out())
    assert len(pool) == 116
    for slot, words in shapes.VOCABULARY.items():  # yet it sees every word
        assert {getattr(caption, slot) for caption in pool} == set(words)


def test_every_caption_survives_printing_and_parsing():
    for caption in shapes.captions():
        assert parse(str(caption)) == caption


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("A RED circle, moving right at night!", Caption("red", "circle", "right", "night")),
        ("green", Caption(colour="green")),
        ("a shape moves up", Caption(direction="up")),
        ("", Caption()),
    ],
)
def test_prompts_may_be_loose_or_leave_slots_open(prompt: str, caption: Caption):
    assert parse(prompt) == caption


def test_an_unknown_word_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'banana'.*colour: red, green.*direction: left") as error:
        parse("a red banana")
    assert "\n" not in str(error.value)


def test_two_words_for_one_slot_are_refused():
    with pytest.raises(ValueError, match="two words for colour, 'red' and 'blue'"):
        parse("a red blue circle")
