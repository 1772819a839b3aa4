"""The table held against the real classes, and the index from files against the index from models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.bases.torch_module import TorchModule, live_entries
from lorahub.errors import UnsupportedFormat, UsageError
from lorahub_transformers.families import BY_CLASS, FAMILIES

OWN = {(kind, head.name): family for kind, family in FAMILIES.items() for head in family.heads} | dict(BY_CLASS)
CLASSES = list(OWN)
TYING = [each for each, family in OWN.items() if family.head(each[1]).tied]
TWO_LABELS = {"DistilBertForQuestionAnswering"}  # the class refuses any other number
USUAL = [
    ("bert", "BertForMaskedLM"),
    ("roberta", "RobertaForSequenceClassification"),
    ("distilbert", "DistilBertModel"),
    ("gpt2", "GPT2LMHeadModel"),
    ("gpt_neox", "GPTNeoXForCausalLM"),
    ("llama", "LlamaForCausalLM"),
    ("t5", "T5ForConditionalGeneration"),
    ("vit", "ViTForImageClassification"),
    ("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
]


def essence(index: BaseIndex) -> BaseIndex:
    """The index without what is allowed to differ: where it is from, how that place spells a name, save-time config."""
    plain = {name: replace(info, stored_as="") for name, info in index.parameters.items()}
    return replace(index, ref=BaseRef(), parameters=plain, config={}, extras={})


def from_files(framework, folder) -> BaseIndex:
    return framework.index(BaseRef(), survey_base(folder))


def shapes(framework, model) -> dict[str, tuple[int, ...]]:
    """Every parameter by canonical name, tied ones under all their names."""
    index = framework.index_model(model, BaseRef())
    return {name: tuple(tensor.shape) for name, tensor in framework.parameters(model, index).items()}


def on_meta(kind, name, tiny, **more):
    with torch.device("meta"):
        return tiny(kind, name, **more)


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_headers_a_live_model_and_a_meta_model_give_the_same_index(kind, name, tiny, saved, framework):
    model = tiny(kind, name)
    files = from_files(framework, saved(model))

    assert essence(files) == essence(framework.index_model(model, BaseRef()))
    assert essence(files) == essence(framework.index_model(on_meta(kind, name, tiny), BaseRef()))
    assert files.order == framework.index_model(model, BaseRef()).order
    assert files.declared
    assert not files.extras


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_the_table_has_modules_in_the_order_in_which_the_class_builds_them(kind, name, tiny, saved, framework):
    model = tiny(kind, name)
    files, live = from_files(framework, saved(model)), framework.index_model(model, BaseRef())

    assert len(files.registered) > 5
    assert files.registered == tuple(module for module in live.registered if module in files.registered)
    types = (torch.nn.Linear, torch.nn.Embedding, transformers.pytorch_utils.Conv1D)
    assert len(files.registered) == sum(isinstance(module, types) for module in model.modules())


@pytest.mark.parametrize(("kind", "name"), [each for each in CLASSES if OWN[each].layers])
def test_the_list_of_layers_is_the_one_that_the_configuration_counts(kind, name, tiny, saved, framework):
    family = OWN[kind, name]
    model = tiny(kind, name, **{family.count: 3})
    files, live = from_files(framework, saved(model)), framework.index_model(model, BaseRef())

    assert files.layers == live.layers
    assert files.layers.path == f"{family.prefix}{family.layers}"
    assert files.config[files.layers.count] == files.layers.depth(files.parameters) == 3
    assert all(len(values) == 3 for values in files.layers.each.values())
    told_apart = {key for key, value in model.config.to_dict().items() if isinstance(value, list) and len(value) == 3}
    assert told_apart - {"architectures"} == files.layers.each.keys()


@pytest.mark.parametrize(("kind", "name"), TYING)
@pytest.mark.parametrize("tie", [True, False])
def test_tied_or_not_headers_and_model_agree(kind, name, tie, tiny, saved, framework):
    model = tiny(kind, name, tie_word_embeddings=tie)
    files, live = from_files(framework, saved(model)), framework.index_model(model, BaseRef())

    assert essence(files) == essence(live)
    always = not OWN[kind, name].unties
    assert bool(files.tied) is (tie or always)
    assert files.tied == live.tied


@pytest.mark.parametrize(("kind", "name"), USUAL)
def test_shards_and_a_single_file_give_the_same_index(kind, name, tiny, saved, framework):
    model = tiny(kind, name)
    single = from_files(framework, saved(model))
    folder = saved(model, max_shard_size="4KB")

    assert len(survey_base(folder).headers) > 1
    assert from_files(framework, folder) == single


@pytest.mark.parametrize(("kind", "name"), USUAL)
def test_half_precision_has_the_same_structure_and_another_dtype(kind, name, tiny, saved, framework):
    full = from_files(framework, saved(tiny(kind, name)))
    half = from_files(framework, saved(tiny(kind, name, dtype=torch.bfloat16)))

    assert half.structure == full.structure
    assert {info.dtype for info in half.parameters.values()} == {"BF16"}
    assert {info.dtype for info in full.parameters.values()} == {"F32"}


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_roles_and_orientation_in_the_table_are_those_of_the_modules(kind, name, tiny, framework):
    model = on_meta(kind, name, tiny)
    index = framework.index_model(model, BaseRef())
    by_stored = {info.stored_as: info for info in index.parameters.values()}
    live, _ = live_entries(model, leaders=set(by_stored))

    found = {stored: (info.role, info.transposed) for stored, info in by_stored.items()}
    assert found == {stored: (live[stored].role, live[stored].transposed) for stored in by_stored}


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_a_head_in_the_table_has_exactly_the_parameters_of_its_class(kind, name, tiny, framework):
    family = OWN[kind, name]
    head = family.head(name)
    bare = FAMILIES[kind]
    backbone = {
        family.prefix + each.removeprefix(bare.prefix): shape
        for each, shape in shapes(framework, on_meta(kind, bare.heads[0].name, tiny)).items()
    }
    whole = shapes(framework, on_meta(kind, name, tiny))

    optional = {each for each in (*whole, *backbone) if each.startswith(family.parts)} if family.parts else set()
    assert set(whole) - set(backbone) - optional == set(head.parameters)
    for part in family.parts:
        assert any(each == part or each.startswith(f"{part}.") for each in whole) is (part not in head.without)


@pytest.mark.parametrize(("kind", "name"), [each for each in CLASSES if each[1] not in TWO_LABELS])
def test_the_rows_of_the_labels_parameter_are_the_number_of_labels(kind, name, tiny, framework):
    labels = OWN[kind, name].head(name).labels
    five, seven = (shapes(framework, on_meta(kind, name, tiny, num_labels=count)) for count in (5, 7))

    differing = {each.rpartition(".")[0] for each in five if five[each] != seven[each]}
    assert differing == ({labels.rpartition(".")[0]} if labels else set())
    if labels:
        assert (five[labels][0], seven[labels][0]) == (5, 7)


def test_a_bare_encoder_gets_the_prefix_and_keeps_its_own_names_in_stored_as(tiny, saved, framework):
    bare = from_files(framework, saved(tiny("bert", "BertModel")))
    whole = from_files(framework, saved(tiny("bert", "BertForSequenceClassification")))

    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert bare.parameters[name].stored_as == "encoder.layer.1.attention.self.query.weight"
    assert whole.parameters[name].stored_as == name
    assert set(whole.parameters) - set(bare.parameters) == {"classifier.weight", "classifier.bias"}
    assert "encoder.layer.1.attention.self.query" in bare.spellings("bert.encoder.layer.1.attention.self.query")


def test_a_language_model_stored_without_prefix_is_that_language_model(tiny, tmp_path, framework):
    # The published GPT-2 checkpoints look like this: class with a head, names without the prefix.
    model = tiny("gpt2", "GPT2LMHeadModel")
    bare = {name.removeprefix("transformer."): t.contiguous() for name, t in model.transformer.state_dict().items()}
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    save_file(bare, tmp_path / "model.safetensors")

    index = from_files(framework, tmp_path)
    assert essence(index) == essence(framework.index_model(model, BaseRef()))
    assert index.tied == (("transformer.wte.weight", "lm_head.weight"),)


@pytest.mark.parametrize(
    ("kind", "name", "canonical", "spelled"),
    [
        (
            "vit",
            "ViTForImageClassification",
            "vit.layers.1.attention.q_proj",
            "vit.encoder.layer.1.attention.attention.query",
        ),
        (
            "vit",
            "ViTForImageClassification",
            "vit.layers.1.attention.q_proj",
            "encoder.layer.1.attention.attention.query",
        ),
        ("vit", "ViTModel", "vit.layers.0.mlp.fc2", "encoder.layer.0.output.dense"),
        ("vit", "ViTModel", "vit.layers.0.layernorm_before", "vit.encoder.layer.0.layernorm_before"),
        ("gpt_neox", "GPTNeoXForCausalLM", "lm_head", "embed_out"),
        ("llama", "LlamaForCausalLM", "model.layers.0.mlp.up_proj", "transformer.layers.0.mlp.up_proj"),
        (
            "t5",
            "T5ForConditionalGeneration",
            "encoder.block.0.layer.0.SelfAttention.q",
            "transformer.encoder.block.0.layer.0.SelfAttention.q",
        ),
        ("gpt2", "GPT2LMHeadModel", "lm_head", "lm_head"),
    ],
)
def test_adapters_may_spell_a_module_in_every_way_the_library_ever_did(
    kind, name, canonical, spelled, tiny, saved, framework
):
    index = from_files(framework, saved(tiny(kind, name)))
    assert canonical in index.modules()
    assert spelled in index.spellings(canonical)


@pytest.mark.parametrize(
    "name",
    ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection"],
)
def test_files_of_a_pipelines_encoder_have_one_level_more_than_the_class_and_are_the_same_base(
    name, tiny, saved, framework
):
    part = "text" if "Text" in name else "vision"

    def age(tensors):
        plain = {key.removeprefix(f"{part}_model."): tensor for key, tensor in tensors.items()}
        older = {key if "projection" in key else f"{part}_model.{key}": tensor for key, tensor in plain.items()}
        return older | {f"{part}_model.embeddings.position_ids": torch.arange(20)[None]}

    model = tiny(f"clip_{part}_model", name)
    folder = resave(saved(model), age)
    index, live = from_files(framework, folder), framework.index_model(model, BaseRef())
    assert replace(essence(index), extras={}) == essence(live)
    assert {info.stored_as for info in index.extras.values()} == {f"{part}_model.embeddings.position_ids"}
    query = next(module for module in index.modules() if module.endswith("layers.1.self_attn.q_proj"))
    assert f"{query}.weight" in framework.parameters(model, index)
    for each in (index, live):
        plain = query.removeprefix(f"{part}_model.")
        assert {plain, f"{part}_model.{plain}"} <= {*each.spellings(query), query}


def test_a_vit_checkpoint_is_stored_under_its_old_names(tiny, saved, framework):
    index = from_files(framework, saved(tiny("vit", "ViTModel")))
    info = index.parameters["vit.layers.0.attention.o_proj.weight"]
    assert info.stored_as == "encoder.layer.0.attention.output.dense.weight"


def resave(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def test_the_first_releases_names_of_layer_norms_are_understood(tiny, saved, framework):
    model = tiny("bert", "BertForSequenceClassification")
    clean = from_files(framework, saved(model))

    def age(tensors):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, was in old.items():
            tensors = {name.replace(new, was): tensor for name, tensor in tensors.items()}
        return tensors

    index = from_files(framework, resave(saved(model), age))
    assert index.structure == clean.structure
    assert index.parameters["bert.embeddings.LayerNorm.weight"].stored_as == "bert.embeddings.LayerNorm.gamma"


@pytest.mark.parametrize(
    ("kind", "name", "buffers"),
    [
        ("bert", "BertModel", {"embeddings.position_ids": [1, 20]}),
        ("roberta", "RobertaForMaskedLM", {"roberta.embeddings.position_ids": [1, 20]}),
        (
            "gpt2",
            "GPT2LMHeadModel",
            {"transformer.h.0.attn.bias": [1, 1, 20, 20], "transformer.h.0.attn.masked_bias": []},
        ),
        (
            "gpt_neox",
            "GPTNeoXForCausalLM",
            {
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq": [4],
                "gpt_neox.layers.1.attention.bias": [1, 1, 20, 20],
            },
        ),
        ("llama", "LlamaForCausalLM", {"model.layers.0.self_attn.rotary_emb.inv_freq": [4]}),
        (
            "t5",
            "T5ForConditionalGeneration",
            {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": [32, 2]},
        ),
    ],
)
def test_buffers_of_old_checkpoints_are_extras_and_change_no_digest(kind, name, buffers, tiny, saved, framework):
    clean = from_files(framework, saved(tiny(kind, name)))
    added = {buffer: torch.zeros(shape) for buffer, shape in buffers.items()}
    index = from_files(framework, resave(saved(tiny(kind, name)), lambda tensors: tensors | added))

    assert {info.stored_as for info in index.extras.values()} == set(buffers)
    assert replace(index, extras={}) == clean
    assert index.structure == clean.structure


@pytest.mark.parametrize(
    ("kind", "name", "copies"),
    [
        ("gpt2", "GPT2LMHeadModel", {"lm_head.weight": "transformer.wte.weight"}),
        (
            "bert",
            "BertForMaskedLM",
            {
                "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias",
            },
        ),
        (
            "t5",
            "T5ForConditionalGeneration",
            {"encoder.embed_tokens.weight": "shared.weight", "lm_head.weight": "shared.weight"},
        ),
    ],
)
def test_second_copies_of_tied_parameters_are_extras(kind, name, copies, tiny, saved, framework):
    clean = from_files(framework, saved(tiny(kind, name)))
    index = from_files(
        framework,
        resave(
            saved(tiny(kind, name)), lambda tensors: tensors | {new: tensors[of].clone() for new, of in copies.items()}
        ),
    )
    assert set(index.extras) == set(copies)
    assert replace(index, extras={}) == clean


def test_a_tied_parameter_stored_under_its_other_name_only_keeps_its_canonical_one(tiny, saved, framework):
    def swap(tensors):
        return {"lm_head.weight" if name == "transformer.wte.weight" else name: t for name, t in tensors.items()}

    model = tiny("gpt2", "GPT2LMHeadModel")
    index = from_files(framework, resave(saved(model), swap))
    assert index.parameters["transformer.wte.weight"].stored_as == "lm_head.weight"
    assert essence(index) == essence(framework.index_model(model, BaseRef()))


def test_a_t5_with_an_output_layer_of_its_own_is_not_tied_to_it(tiny, saved, framework):
    # T5 v1.1: the configuration says untied, transformers 5 finds two different tensors and leaves them apart.
    folder = saved(tiny("t5", "T5ForConditionalGeneration"))
    resave(folder, lambda tensors: tensors | {"lm_head.weight": torch.randn(50, 16)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))

    index = from_files(framework, folder)
    live = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    assert "lm_head.weight" in index.parameters
    assert essence(index) == essence(framework.index_model(live, BaseRef()))


def test_one_parameter_under_two_names_is_refused(tiny, saved, framework):
    folder = resave(
        saved(tiny("gpt_neox", "GPTNeoXForCausalLM")),
        lambda tensors: tensors | {"lm_head.weight": torch.zeros_like(tensors["embed_out.weight"])},
    )
    with pytest.raises(
        UnsupportedFormat, match=r"embed_out\.weight.*lm_head\.weight|lm_head\.weight.*embed_out\.weight"
    ):
        from_files(framework, folder)


def test_a_quantised_base_is_refused_by_name(tiny, saved, framework):
    folder = saved(tiny("llama", "LlamaForCausalLM"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedFormat, match="gptq"):
        from_files(framework, folder)


def test_an_architecture_outside_the_table_is_known_from_its_class(tiny, saved, framework):
    model = tiny("opt", "OPTForCausalLM")
    index = from_files(framework, saved(model))
    live = framework.index_model(model, BaseRef())

    assert index.declared
    assert essence(index) == essence(live)
    assert index.tied == (("model.decoder.embed_tokens.weight", "lm_head.weight"),)
    assert framework.targets(index, "attention") == framework.targets(live, "attention")
    with pytest.raises(UsageError, match="opt"):
        framework.targets(index, "all-conv")


def test_gpt2_layouts_are_transposed_and_its_head_is_not(tiny, framework):
    index = framework.index_model(tiny("gpt2", "GPT2ForSequenceClassification"), BaseRef())
    fused = Target("", "transformer.h.0.attn.c_attn", "weight")
    score, bias = Target("", "score", "weight"), Target("", "transformer.h.0.attn.c_attn", "bias")
    layouts = framework.layouts(index, [fused, score, bias, Target("", "transformer.h.9.attn.c_attn", "weight")])

    assert set(layouts) == {fused, score, bias}
    region = layouts[fused].pieces[0].of_parameter
    assert region.shape(index.parameters[fused.name].shape) == (48, 16)
    assert layouts[score].pieces[0].of_parameter.whole
    assert layouts[bias].pieces[0].of_parameter.whole


def test_a_tied_target_lands_in_the_parameter_that_is_stored(tiny, framework):
    index = framework.index_model(tiny("gpt2", "GPT2LMHeadModel"), BaseRef())
    target = Target("", "lm_head", "weight")
    assert framework.layouts(index, [target])[target].pieces[0].parameter == "transformer.wte.weight"
    assert index.tied_with("lm_head.weight") == ("transformer.wte.weight",)


def test_presets_name_the_linear_modules_of_the_backbone(tiny, framework):
    index = framework.index_model(tiny("llama", "LlamaForCausalLM"), BaseRef())
    attention = [target.module for target in framework.targets(index, "attention")]
    linear = {target.module for target in framework.targets(index, "all-linear")}

    assert len(attention) == 8
    assert attention[0] == "model.layers.0.self_attn.k_proj"
    assert linear - set(attention) == {
        f"model.layers.{layer}.mlp.{each}_proj" for layer in (0, 1) for each in ("gate", "up", "down")
    }
    with pytest.raises(UsageError, match="all-linear"):
        framework.targets(index, "everything")


def test_live_tensors_have_canonical_names_and_tied_names_give_one_tensor(tiny, saved, framework):
    model = tiny("bert", "BertModel")
    index = from_files(framework, saved(model))
    tensors = framework.parameters(model, index)
    assert set(tensors) == set(index.parameters)
    assert tensors["bert.pooler.dense.bias"] is model.pooler.dense.bias

    model = tiny("gpt2", "GPT2LMHeadModel")
    tensors = framework.parameters(model, framework.index_model(model, BaseRef()))
    assert tensors["lm_head.weight"] is tensors["transformer.wte.weight"]


def test_the_framework_wins_over_plain_torch(tiny, saved, framework):
    frameworks = {"torch": TorchModule(), "transformers": framework}
    model = tiny("vit", "ViTForImageClassification")
    assert index_base(survey_base(saved(model)), BaseRef(), frameworks)[0] is framework
    assert index_live(model, frameworks)[0] is framework
    assert index_live(torch.nn.Linear(2, 2), frameworks)[0] is frameworks["torch"]


def test_tokenizer_and_processor_files_come_along_and_weights_do_not(tiny, saved, framework):
    folder = saved(tiny("bert", "BertModel"))
    wanted = ["chat_template.jinja", "preprocessor_config.json", "spiece.model", "tokenizer.json", "vocab.txt"]
    for name in [*wanted, "README.md", "optimizer.pt", "training_args.bin"]:
        (folder / name).write_text("{}")
    assert framework.companions(survey_base(folder)) == tuple(sorted([*wanted, "config.json"]))


def test_a_base_opens_in_the_class_its_configuration_names(tiny, saved, framework):
    folder = saved(tiny("gpt2", "GPT2ForSequenceClassification"))
    assert type(framework.open_base(folder)).__name__ == "GPT2ForSequenceClassification"
    assert framework.open_base(folder, dtype="BF16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["os", "EvilModel", "AutoConfig", "is_torch_available"])
def test_a_class_that_is_no_model_of_the_library_is_refused(name, tiny, saved, framework):
    folder = saved(tiny("gpt2", "GPT2Model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    with pytest.raises(UnsupportedFormat, match=name):
        framework.open_base(folder)
