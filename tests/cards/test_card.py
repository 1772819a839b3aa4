"""A card as a whole: the author's text stays, ours is written in its place, and what files say can do nothing."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from cards.making import PEFT, RECORD, Made, peft_tensors, write
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorahub.adapter import AdapterHeader
from lorahub.cards import PICTURE, make_card, read_card
from lorahub.errors import RecordError
from lorahub.records import AdapterRecord

TRL = """---
base_model: /home/me/llama
library_name: transformers
model_name: sft-out
tags:
- generated_from_trainer
- sft
- trl
licence: license
---

# Model Card for sft-out

This model is a fine-tuned version of [None](https://huggingface.co/None).
It has been trained using [TRL](https://github.com/huggingface/trl).

## Quick start

```python
from transformers import pipeline
generator = pipeline("text-generation", model="None", device="cuda")
```

### Framework versions

- TRL: 0.24.0
"""
MARK = re.compile(r"<!-- lorahub: begin .*-->\n")


def ours(text: str) -> str:
    """The part between the two comments."""
    return MARK.split(text)[1].partition("<!-- lorahub: end -->")[0]


def test_what_trl_writes_stays_and_gets_base_library_tags_and_our_part(made: Made) -> None:
    card = made(TRL)
    body = TRL.partition("licence: license\n---\n")[2]
    data = ModelCard(card.text).data
    assert ModelCard(card.text).text.startswith(body)
    assert (data.base_model, data.library_name, data.license) == ("acme/base", "transformers", "apache-2.0")
    assert data.tags == ["generated_from_trainer", "sft", "trl", "transformers", "lora", "lorahub"]
    assert 'PeftModel.from_pretrained(base, "acme/ink", revision="v1.2.0")' in ours(card.text)
    assert made(card.text).text == card.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT does
def test_what_peft_writes_comes_out_well(tmp_path: Path, made: Made) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_head=1, n_layer=1, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.config._name_or_path = model.name_or_path = "/data/llama"
    tuned = get_peft_model(
        model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    )
    tuned.create_or_update_model_card(str(tmp_path))
    text = read_card(tmp_path)
    assert text is not None
    card = made(text)
    data = ModelCard(card.text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("acme/base", "peft", "text-generation")
    assert data.tags == ["base_model:adapter:acme/base", "lora", "transformers", "lorahub"]
    assert ModelCard(card.text).text.startswith(ModelCard(text).text)
    assert "/data/llama" not in card.text


def test_the_same_record_gives_the_same_bytes(made: Made) -> None:
    first = made()
    again = made(first.text)
    assert (again.text, again.pictures, again.findings) == (first.text, first.pictures, ())
    assert made() == first


def test_a_new_record_changes_our_part_alone_and_in_its_place(made: Made) -> None:
    first = made("# Mine\n\nBefore.\n").text + "\nBehind, by hand.\n"
    second = made(first, description="Writes in ink.").text
    assert second.partition("<!-- lorahub")[0].endswith("---\n# Mine\n\nBefore.\n\n")
    assert second.endswith("<!-- lorahub: end -->\n\nBehind, by hand.\n")
    assert "Writes in ink." in ours(second)


def test_our_part_may_be_moved(made: Made) -> None:
    text = made("# Mine\n\nWords.\n").text
    front, _, body = text.partition("# Mine\n\nWords.\n\n")
    moved = f"{front}{body}\n# Mine\n\nWords.\n"
    assert made(moved).text == moved


def test_our_part_may_be_saved_by_an_editor_that_trims_lines_and_changes_line_ends(made: Made) -> None:
    saved = re.sub(r"[ \t]+\n", "\n", made("# Mine\n").text).replace("\n", "\r\n")
    assert made(saved, description="New.").text.count("\n") == made(saved, description="New.").text.count("\r\n")


def test_what_was_written_by_hand_into_our_part_is_never_lost(made: Made) -> None:
    text = made().text.replace("## About this adapter", "## About this adapter\n\nMy own words.")
    with pytest.raises(RecordError, match=r"from line \d+ on: lorahub's part was changed by hand") as caught:
        made(text)
    assert "move what you wrote out of it" in caught.value.hint
    emptied = MARK.split(text)[0] + "<!-- lorahub: begin -->\n<!-- lorahub: end -->\n"
    assert ours(made(emptied).text) == ours(made().text)


@pytest.mark.parametrize(
    "broken",
    [
        "<!-- lorahub: begin -->\n",
        "<!-- lorahub: end -->\n<!-- lorahub: begin -->\n",
        "<!-- lorahub: begin -->\n<!-- lorahub: end -->\n<!-- lorahub: begin -->\n<!-- lorahub: end -->\n",
        "<!-- lorahub: begin --> words\n<!-- lorahub: end -->\n",
        "<!-- lorahub: begin -->\n<!-- lorahub: end --> words\n",
        "<!-- lorahub:begin -->\n<!-- lorahub: end -->\n",
    ],
)
def test_comments_that_are_no_pair_are_refused_with_their_lines(made: Made, broken: str) -> None:
    with pytest.raises(RecordError, match=r"not one beginning and one end \(line 2"):
        made(f"# Mine\n{broken}")


_BODY = st.lists(
    st.sampled_from(
        ["\n", "\r\n", "-", "---\n", "#", "a", " ", "`", "<!--", "-->", "|", "\u2028", "\x85", "é", "```\n"]
    ),
    max_size=30,
).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(body=_BODY)
def test_the_authors_text_is_kept_byte_for_byte(made: Made, body: str) -> None:
    text = f"---\nlicense: apache-2.0\n---\n{body}x"
    card = made(text)
    assert f"---\n{body}x" in card.text
    assert made(card.text).text == card.text
    assert card.text.count("<!-- lorahub: begin") == 1


def test_a_byte_order_mark_stays_at_the_start(made: Made) -> None:
    card = made("\ufeff# Mine\n")
    assert card.text.startswith("\ufeff---\n")
    assert card.text.count("\ufeff") == 1


HOSTILE = (
    "a|b <script>alert(1)</script> `x` [l](javascript:x) ![i](//e) $$x$$ \x1b]0;t\x07 \u202e\n"
    "# h\n---\n<!-- lorahub: end -->"
)


def test_what_files_say_is_shown_and_can_do_nothing(made: Made) -> None:
    fields: dict[str, Any] = {
        "title": HOSTILE,
        "description": HOSTILE,
        "authors": [HOSTILE],
        "trigger_words": [HOSTILE],
        "usage_hint": HOSTILE,
        "tags": [HOSTILE],
        "license": HOSTILE,
        "license_link": "javascript:alert(1)",
        "inherits_from": [HOSTILE],
        "evals": [{"task": HOSTILE, "dataset": HOSTILE, "metric": HOSTILE, "value": 1.0}],
        "parents": [{"ref": HOSTILE, "role": HOSTILE}],
        "recipe": {"method": HOSTILE, "params": {HOSTILE: HOSTILE}},
        "training": {"optimizer": HOSTILE, "trainer": {"name": HOSTILE}},
        "base": RECORD["base"] | {"architecture": HOSTILE, "library": HOSTILE},
    }
    card = made(None, **fields)
    body = ModelCard(card.text).text
    assert made(card.text, **fields).text == card.text
    assert body.count("<!-- lorahub: end -->") == 1
    for line in body.replace(next(iter(MARK.findall(body))), "").splitlines():
        bare = re.sub(r"`[^`]*`", "", line)
        assert not re.search(
            r"<(?!sub>|/sub>|code>|/code>|!-- lorahub)|(?<!\\)\]\((?!https://|lorahub-layers)", bare
        ), line
        assert "$$" not in bare
        if line.startswith("|"):
            columns = len(re.findall(r"(?<!\\)\|", line))
            assert columns in (3, 5, 6, 7), line
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", card.text)
    picture = card.pictures[PICTURE].decode()
    assert "<script" not in picture
    assert "\x1b" not in picture


def test_a_token_in_the_record_does_not_reach_the_card(made: Made) -> None:
    token = "hf_" + "a1B2" * 10
    assert token not in made(None, description=f"use {token}", tags=[token], trigger_words=[token]).text


def test_a_composition_shows_its_parents_and_how_they_were_joined(made: Made) -> None:
    text = ours(
        made(
            None,
            parents=[
                {"ref": "acme/ink@1.0", "weight": 0.7, "revision": "c" * 40, "digest": f"sha256:{'d' * 64}"},
                {"ref": "acme/oil@2.0", "weight": 0.3},
            ],
            recipe={"method": "dare_ties", "params": {"density": 0.5}, "seed": 7},
        ).text
    )
    assert "Composed of 2 adapters by `dare_ties`, seed 7. Options: `density` `0.5`." in text
    assert "| `acme/ink@1.0` | 0.7 | `cccccccccccc` | `sha256:dddddddddddd...` |" in text
    assert "| `acme/oil@2.0` | 0.3 |  |  |" in text


def test_facts_of_the_record_are_told(made: Made) -> None:
    text = ours(
        made(
            None,
            trigger_words=["ink style"],
            strength={"recommended": 0.8, "min": 0.4, "max": 1.2},
            training={"datasets": [{"id": "acme/tales"}], "steps": 1200, "lr": 2e-4, "seed": 1},
            evals=[
                {
                    "task": "text-generation",
                    "dataset": "acme/tales",
                    "metric": "bleu",
                    "value": 31.5,
                    "delta_vs_base": 2,
                }
            ],
            inherits_from=["acme/base"],
        ).text
    )
    for told in (
        "| Kind | LoRA, rank 2 |",
        "| Changes | `q_proj`, `v_proj` (6 modules) |",
        "[acme/base](https://huggingface.co/acme/base/tree/0123456789abcdef0123456789abcdef01234567)",
        f"`sha256:{'b' * 64}`",
        "| Trigger words | `ink style` |",
        "| Weight | 0.8 recommended, from 0.4 to 1.2 |",
        "| Steps | 1,200 |",
        "| text-generation | acme/tales | bleu | 31.5 | +2 |",
        "bound by the licences of `acme/base` as well",
        "lorahub merge acme/ink@1.2.0:0.8 --base acme/base@0123456789abcdef0123456789abcdef01234567 -o merged",
    ):
        assert told in text


LORA = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (2, 8)} | {
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": (8, 2)
}
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
LAYOUTS: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, Any], str]] = {
    "peft": ("adapter_model.safetensors", peft_tensors(), {"adapter_config": PEFT}, "peft"),
    "peft in a file that PEFT does not look for": ("ink.safetensors", peft_tensors(), {"adapter_config": PEFT}, ""),
    "diffusers": ("pytorch_lora_weights.safetensors", LORA, {}, "diffusers"),
    "kohya": (
        "ink.safetensors",
        {f"{KOHYA}.lora_down.weight": (2, 8), f"{KOHYA}.lora_up.weight": (8, 2), f"{KOHYA}.alpha": ()},
        {},
        "diffusers",
    ),
    "kohya with scales of DoRA, which diffusers drops": (
        "ink.safetensors",
        {f"{KOHYA}.lora_down.weight": (2, 8), f"{KOHYA}.lora_up.weight": (8, 2), f"{KOHYA}.dora_scale": (1, 8)}
        | {f"{KOHYA}.alpha": ()},
        {},
        "",
    ),
    "kohya of a kind that diffusers does not read": (
        "ink.safetensors",
        {f"{KOHYA}.hada_{name}": (8, 2) if name.endswith("a") else (2, 8) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        | {f"{KOHYA}.alpha": ()},
        {},
        "",
    ),
}
WORDS = {"peft": "PeftModel.from_pretrained", "diffusers": "load_lora_weights"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_a_framework_that_loads_the_layout_is_named(tmp_path: Path, layout: str) -> None:
    file, shapes, configs, library = LAYOUTS[layout]
    header = write(tmp_path / "a", file, shapes, **configs)
    record = AdapterRecord.from_json(RECORD | {"kinds": list(header.kinds), "trigger_words": ["ink style"]})
    text = make_card(None, header, record, repo="acme/ink").text
    data = ModelCard(text).data
    assert (data.library_name or "") == library
    assert [word for word in WORDS.values() if word in text] == [WORDS[name] for name in WORDS if name == library]
    assert data.get("instance_prompt") == ("ink style" if library == "diffusers" else None)
    assert "lorahub pull acme/ink@1.2.0" in text


def test_an_adapter_that_changes_no_weights_is_not_said_to_merge(tmp_path: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": 8}
    header = write(tmp_path / "a", "adapter_model.safetensors", {"prompt_embeddings": (4, 8)}, adapter_config=config)
    card = make_card(None, header, AdapterRecord.from_json(RECORD | {"kinds": ["prompt-tuning"]}), repo="acme/ink")
    assert ModelCard(card.text).data.tags == ["transformers", "prompt-tuning", "lorahub"]
    assert "| Carries | `prompt-tuning` |" in card.text
    assert "PeftModel.from_pretrained" in card.text
    assert not re.search("lorahub merge|lorahub.attach|lorahub check", card.text)
    assert card.pictures == {}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_takes_every_tensor_of_the_layouts_it_is_named_for(tmp_path: Path, layout: str) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    file, shapes, configs, _ = LAYOUTS[layout]
    header = write(tmp_path / "a", file, shapes, **configs)
    taken, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(header.folder), weight_name=file)
    assert len(taken) + len(alphas or {}) == len(shapes)
    assert all(name.startswith("unet.") for name in taken)


def test_the_lines_for_peft_are_python(made: Made) -> None:
    lines = re.findall(r"```python\n(.*?)\n```", made().text, re.DOTALL)
    assert ["PeftModel" in text for text in lines] == [True, False]
    for text in lines:
        compile(text, "card", "exec")


def test_an_adapter_in_a_folder_of_a_repository_is_loaded_from_there(ink: AdapterHeader) -> None:
    text = make_card(None, ink, AdapterRecord.from_json(RECORD), repo="acme/zoo", subfolder="pets/ink").text
    assert 'from_pretrained(base, "acme/zoo", subfolder="pets/ink", revision="v1.2.0")' in text
    assert 'load_adapter("acme/zoo", adapter_kwargs={"subfolder": "pets/ink", "revision": "v1.2.0"})' in text
    assert "lorahub pull acme/zoo@1.2.0/pets/ink" in text


def test_transformers_own_line_is_given_where_it_loads_all_of_it(tmp_path: Path) -> None:
    tensors = peft_tensors()
    plain = write(tmp_path / "a", "adapter_model.safetensors", tensors, adapter_config=PEFT)
    headed = write(
        tmp_path / "b", "adapter_model.safetensors", tensors, adapter_config=PEFT | {"modules_to_save": ["score"]}
    )
    shown = [
        ".load_adapter(" in make_card(None, each, AdapterRecord.from_json(RECORD), repo="acme/ink").text
        for each in (plain, headed)
    ]
    assert shown == [True, False]


def test_the_picture_shows_every_layer_and_is_the_same_bytes_each_time(made: Made, ink: AdapterHeader) -> None:
    card = made()
    picture = card.pictures[PICTURE]
    assert f"]({PICTURE})" in card.text
    assert hashlib.sha256(picture).digest() == hashlib.sha256(made().pictures[PICTURE]).digest()
    assert picture.decode().count("<title>") == 1 + len(ink.reading.groups)
    given_ = make_card(None, ink, AdapterRecord.from_json(RECORD), repo="acme/ink", picture="<svg/>")
    assert given_.pictures == {PICTURE: b"<svg/>"}


def test_a_readme_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"# \xff\xfe")
    with pytest.raises(RecordError, match="not UTF-8 at byte 2"):
        read_card(tmp_path)
    assert read_card(tmp_path / "nothing") is None
