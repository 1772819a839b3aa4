"""The architectures, as a table: how each names its modules, what each head has, what is tied to what.

Data alone: every entry is held against the real classes by ``tests/test_families.py``.  A pattern is a dotted path in
which ``*`` stands for a number; patterns are relative to the backbone (below ``prefix``).  To add an architecture, add
a ``Family``; to add a head, add a ``Head``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["BY_CLASS", "FAMILIES", "Family", "Head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model class: the backbone and what it puts on top.

    Attributes:
        name: the class ("BertForSequenceClassification").
        task: PEFT's name of its task ("SEQ_CLS"), or "".
        parameters: every parameter on top of the backbone, also those that may be tied to one in it.
        labels: the one whose rows are the labels (``num_labels``), or "".
        tied: (stored name, other name) pairs that share storage where the configuration ties.
        without: parts of the backbone (``Family.parts``) that this class does not build.
        prefix: how its checkpoints spell the family's prefix, where they do so differently.
    """

    name: str
    task: str = ""
    parameters: tuple[str, ...] = ()
    labels: str = ""
    tied: tuple[tuple[str, str], ...] = ()
    without: tuple[str, ...] = ()
    prefix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
        prefix: where models with a head keep the backbone ("bert."); canonical names have it.
        others: other spellings of the prefix; "" for a bare backbone.
        attention, feed_forward, other_linear: linear modules of the backbone.
        embedding, conv: embedding and convolution modules of the backbone.
        layers: the list of like layers, of which an adapter may want some repeated; "" where nobody trains such.
        count: what the configuration calls their number.
        transposed: the backbone's linear modules store their weight [in, out].
        renamed: (stored, live) pairs of path beginnings where checkpoints spell a backbone's module differently, the
            longest first.
        renamed_heads: the same outside the backbone.
        leftovers: what old checkpoints hold besides and nobody reads.
        built: patterns in the order in which the classes build these modules, with the prefix, where that is not the
            order of ``embedding``, ``conv``, the linear modules and the head's parameters.
        parts: modules or parameters of the backbone that some classes do not build, as canonical names.
        tied: what ``tie_word_embeddings`` is where the configuration does not say.
        unties: untying can be written into the configuration.
        heads: the classes; the first is the bare backbone.
    """

    prefix: str
    others: tuple[str, ...]
    attention: tuple[str, ...]
    feed_forward: tuple[str, ...] = ()
    other_linear: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    conv: tuple[str, ...] = ()
    layers: str = ""
    count: str = "num_hidden_layers"
    transposed: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    renamed_heads: tuple[tuple[str, str], ...] = ()
    leftovers: tuple[str, ...] = ()
    built: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    tied: bool = False
    unties: bool = True
    heads: tuple[Head, ...] = ()

    @property
    def linear(self) -> tuple[str, ...]:
        """Every linear module of the backbone."""
        return self.attention + self.feed_forward + self.other_linear

    def head(self, name: str) -> Head | None:
        """The class of that name."""
        return next((head for head in self.heads if head.name == name), None)


def _each(stem: str, *leaves: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{leaf}" for leaf in leaves)


def _affine(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias"))


_BERT_ATTENTION = tuple(
    pattern
    for attention in ("attention", "crossattention")
    for pattern in _each(f"encoder.layer.*.{attention}", "self.query", "self.key", "self.value", "output.dense")
)
_BERT_EMBEDDING = _each("embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings")
_BERT_LEFTOVERS = _each("embeddings", "position_ids", "token_type_ids")


def _bert() -> Family:
    words = "bert.embeddings.word_embeddings.weight"
    predictions = (
        "cls.predictions.bias",
        *_affine("cls.predictions.decoder", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    )
    tied = ((words, "cls.predictions.decoder.weight"), ("cls.predictions.bias", "cls.predictions.decoder.bias"))
    following = _affine("cls.seq_relationship")
    classifier, answers = _affine("classifier"), _affine("qa_outputs")
    pooler = ("bert.pooler",)
    return Family(
        prefix="bert.",
        others=("",),
        attention=_BERT_ATTENTION,
        feed_forward=_each("encoder.layer.*", "intermediate.dense", "output.dense"),
        other_linear=("pooler.dense",),
        embedding=_BERT_EMBEDDING,
        layers="encoder.layer",
        leftovers=_BERT_LEFTOVERS,
        built=("bert", "cls.predictions.transform"),
        parts=pooler,
        tied=True,
        heads=(
            Head(name="BertModel", task="FEATURE_EXTRACTION"),
            Head(name="BertForMaskedLM", parameters=predictions, tied=tied, without=pooler),
            Head(name="BertLMHeadModel", task="CAUSAL_LM", parameters=predictions, tied=tied, without=pooler),
            Head(name="BertForPreTraining", parameters=predictions + following, tied=tied),
            Head(name="BertForNextSentencePrediction", parameters=following),
            Head(
                name="BertForSequenceClassification",
                task="SEQ_CLS",
                parameters=classifier,
                labels="classifier.weight",
            ),
            Head(name="BertForMultipleChoice", parameters=classifier),
            Head(
                name="BertForTokenClassification",
                task="TOKEN_CLS",
                parameters=classifier,
                labels="classifier.weight",
                without=pooler,
            ),
            Head(
                name="BertForQuestionAnswering",
                task="QUESTION_ANS",
                parameters=answers,
                labels="qa_outputs.weight",
                without=pooler,
            ),
        ),
    )


def _roberta(stem: str, *, head_first: bool = False) -> Family:
    """RoBERTa, and the models that are RoBERTa under another class name."""
    lm_head = ("lm_head.bias", *_affine("lm_head.decoder", "lm_head.dense", "lm_head.layer_norm"))
    tied = (
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("lm_head.bias", "lm_head.decoder.bias"),
    )
    pooler = ("roberta.pooler",)
    embeddings = _each("roberta.embeddings", "word_embeddings", "token_type_embeddings")
    tops = ("lm_head.dense", "classifier", "qa_outputs")
    return Family(
        prefix="roberta.",
        others=("",),
        attention=_BERT_ATTENTION,
        feed_forward=_each("encoder.layer.*", "intermediate.dense", "output.dense"),
        other_linear=("pooler.dense",),
        embedding=_BERT_EMBEDDING,
        layers="encoder.layer",
        leftovers=_BERT_LEFTOVERS,
        built=tops + embeddings if head_first else embeddings + tops,
        parts=pooler,
        tied=True,
        heads=(
            Head(name=f"{stem}Model", task="FEATURE_EXTRACTION"),
            Head(name=f"{stem}ForMaskedLM", parameters=lm_head, tied=tied, without=pooler),
            Head(name=f"{stem}ForCausalLM", task="CAUSAL_LM", parameters=lm_head, tied=tied, without=pooler),
            Head(
                name=f"{stem}ForSequenceClassification",
                task="SEQ_CLS",
                parameters=_affine("classifier.dense", "classifier.out_proj"),
                labels="classifier.out_proj.weight",
                without=pooler,
            ),
            Head(name=f"{stem}ForMultipleChoice", parameters=_affine("classifier")),
            Head(
                name=f"{stem}ForTokenClassification",
                task="TOKEN_CLS",
                parameters=_affine("classifier"),
                labels="classifier.weight",
                without=pooler,
            ),
            Head(
                name=f"{stem}ForQuestionAnswering",
                task="QUESTION_ANS",
                parameters=_affine("qa_outputs"),
                labels="qa_outputs.weight",
                without=pooler,
            ),
        ),
    )


def _distilbert() -> Family:
    classifier = _affine("pre_classifier", "classifier")
    return Family(
        prefix="distilbert.",
        others=("",),
        attention=_each("transformer.layer.*.attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        feed_forward=_each("transformer.layer.*.ffn", "lin1", "lin2"),
        embedding=_each("embeddings", "word_embeddings", "position_embeddings"),
        leftovers=_BERT_LEFTOVERS,
        tied=True,
        heads=(
            Head(name="DistilBertModel", task="FEATURE_EXTRACTION"),
            Head(
                name="DistilBertForMaskedLM",
                parameters=_affine("vocab_transform", "vocab_layer_norm", "vocab_projector"),
                tied=(("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),),
            ),
            Head(
                name="DistilBertForSequenceClassification",
                task="SEQ_CLS",
                parameters=classifier,
                labels="classifier.weight",
            ),
            Head(name="DistilBertForMultipleChoice", parameters=classifier),
            Head(
                name="DistilBertForTokenClassification",
                task="TOKEN_CLS",
                parameters=_affine("classifier"),
                labels="classifier.weight",
            ),
            Head(
                name="DistilBertForQuestionAnswering",
                task="QUESTION_ANS",
                parameters=_affine("qa_outputs"),
                labels="qa_outputs.weight",
            ),
        ),
    )


def _gpt2() -> Family:
    tied = (("transformer.wte.weight", "lm_head.weight"),)
    return Family(
        prefix="transformer.",
        others=("",),
        attention=(
            *_each("h.*.attn", "c_attn", "c_proj"),
            *_each("h.*.crossattention", "c_attn", "q_attn", "c_proj"),
        ),
        feed_forward=_each("h.*.mlp", "c_fc", "c_proj"),
        embedding=("wte", "wpe"),
        layers="h",
        count="n_layer",
        transposed=True,
        leftovers=(*_each("h.*.attn", "bias", "masked_bias"), *_each("h.*.crossattention", "bias", "masked_bias")),
        tied=True,
        heads=(
            Head(name="GPT2Model", task="FEATURE_EXTRACTION"),
            Head(name="GPT2LMHeadModel", task="CAUSAL_LM", parameters=("lm_head.weight",), tied=tied),
            Head(
                name="GPT2DoubleHeadsModel",
                parameters=("lm_head.weight", *_affine("multiple_choice_head.summary")),
                tied=tied,
            ),
            Head(
                name="GPT2ForSequenceClassification",
                task="SEQ_CLS",
                parameters=("score.weight",),
                labels="score.weight",
            ),
            Head(
                name="GPT2ForTokenClassification",
                task="TOKEN_CLS",
                parameters=_affine("classifier"),
                labels="classifier.weight",
            ),
            Head(name="GPT2ForQuestionAnswering", task="QUESTION_ANS", parameters=_affine("qa_outputs")),
        ),
    )


def _gpt_neox() -> Family:
    return Family(
        prefix="gpt_neox.",
        others=("",),
        attention=_each("layers.*.attention", "query_key_value", "dense"),
        feed_forward=_each("layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
        embedding=("embed_in",),
        layers="layers",
        renamed_heads=(("embed_out", "lm_head"),),
        leftovers=_each("layers.*.attention", "bias", "masked_bias", "rotary_emb.inv_freq"),
        heads=(
            Head(name="GPTNeoXModel", task="FEATURE_EXTRACTION"),
            Head(
                name="GPTNeoXForCausalLM",
                task="CAUSAL_LM",
                parameters=("lm_head.weight",),
                tied=(("gpt_neox.embed_in.weight", "lm_head.weight"),),
            ),
            Head(
                name="GPTNeoXForSequenceClassification",
                task="SEQ_CLS",
                parameters=("score.weight",),
                labels="score.weight",
            ),
            Head(
                name="GPTNeoXForTokenClassification",
                task="TOKEN_CLS",
                parameters=_affine("classifier"),
                labels="classifier.weight",
            ),
            Head(name="GPTNeoXForQuestionAnswering", task="QUESTION_ANS", parameters=_affine("qa_outputs")),
        ),
    )


def _llama(
    stem: str, *, answers: str | None = "transformer.", tied: bool = False, lacking: tuple[str, ...] = ()
) -> Family:
    """Llama, and the models that name their modules as it does.

    Args:
        stem: how its classes begin.
        answers: the question-answering class's prefix, where that is another.
        tied: as in ``Family``.
        lacking: the ends of the classes that it does not have.
    """
    heads = (
        Head(name=f"{stem}Model", task="FEATURE_EXTRACTION"),
        Head(
            name=f"{stem}ForCausalLM",
            task="CAUSAL_LM",
            parameters=("lm_head.weight",),
            tied=(("model.embed_tokens.weight", "lm_head.weight"),),
        ),
        Head(
            name=f"{stem}ForSequenceClassification",
            task="SEQ_CLS",
            parameters=("score.weight",),
            labels="score.weight",
        ),
        Head(
            name=f"{stem}ForTokenClassification",
            task="TOKEN_CLS",
            parameters=_affine("score"),
            labels="score.weight",
        ),
        Head(
            name=f"{stem}ForQuestionAnswering",
            task="QUESTION_ANS",
            parameters=_affine("qa_outputs"),
            prefix=answers,
        ),
    )
    return Family(
        prefix="model.",
        others=("", "transformer.") if answers else ("",),
        attention=_each("layers.*.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forward=_each("layers.*.mlp", "gate_proj", "up_proj", "down_proj"),
        embedding=("embed_tokens",),
        layers="layers",
        leftovers=("rotary_emb.inv_freq", "layers.*.self_attn.rotary_emb.inv_freq"),
        tied=tied,
        heads=tuple(head for head in heads if not head.name.endswith(lacking)) if lacking else heads,
    )


def _t5(stem: str) -> Family:
    """T5, and the models that name their modules as it does."""
    # Conditional generation, the usual class, keeps encoder and decoder at the top; two others put a prefix before.
    stacks = ("encoder", "decoder")
    encoder = (("shared.weight", "encoder.embed_tokens.weight"),)
    both = (*encoder, ("shared.weight", "decoder.embed_tokens.weight"))
    return Family(
        prefix="",
        others=("transformer.",),
        attention=tuple(
            pattern
            for stack in stacks
            for attention in ("SelfAttention", "EncDecAttention")
            for pattern in _each(f"{stack}.block.*.layer.*.{attention}", "q", "k", "v", "o")
        ),
        feed_forward=tuple(
            pattern
            for stack in stacks
            for pattern in _each(f"{stack}.block.*.layer.*.DenseReluDense", "wi", "wi_0", "wi_1", "wo")
        ),
        embedding=(
            "shared",
            *(f"{stack}.block.*.layer.0.SelfAttention.relative_attention_bias" for stack in stacks),
        ),
        leftovers=("decoder.block.*.layer.1.EncDecAttention.relative_attention_bias.weight",),
        built=(
            "shared",
            *(
                f"{stack}.{module}"
                for stack in stacks
                for module in ("embed_tokens", *_each("block.*.layer.*.SelfAttention", "q", "k", "v", "o"))
            ),
        ),
        parts=("decoder",),
        tied=True,
        unties=False,  # these configurations override tie_word_embeddings, and read it as whether outputs are scaled
        heads=(
            Head(name=f"{stem}Model", task="FEATURE_EXTRACTION", tied=both),
            Head(name=f"{stem}EncoderModel", tied=encoder, without=("decoder",)),
            Head(
                name=f"{stem}ForConditionalGeneration",
                task="SEQ_2_SEQ_LM",
                parameters=("lm_head.weight",),
                tied=(*both, ("shared.weight", "lm_head.weight")),
            ),
            Head(
                name=f"{stem}ForSequenceClassification",
                task="SEQ_CLS",
                parameters=_affine("classification_head.dense", "classification_head.out_proj"),
                labels="classification_head.out_proj.weight",
                tied=both,
                prefix="transformer.",
            ),
            Head(
                name=f"{stem}ForTokenClassification",
                task="TOKEN_CLS",
                parameters=_affine("classifier"),
                labels="classifier.weight",
                tied=encoder,
                without=("decoder",),
                prefix="transformer.",
            ),
            Head(
                name=f"{stem}ForQuestionAnswering",
                task="QUESTION_ANS",
                parameters=_affine("qa_outputs"),
                labels="qa_outputs.weight",
                tied=both,
            ),
        ),
    )


def _clip(older: str, head: Head, *, below: bool = False) -> Family:
    """One half of CLIP; releases before the fifth had a level around it always, and their files still do.

    Args:
        older: that level.
        head: the class.
        below: this class still has it.
    """
    pictures = older == "vision_model."
    return Family(
        prefix=older if below else "",
        others=("" if below else older,),
        attention=_each("encoder.layers.*.self_attn", "k_proj", "v_proj", "q_proj", "out_proj"),
        feed_forward=_each("encoder.layers.*.mlp", "fc1", "fc2"),
        embedding=_each("embeddings", *(() if pictures else ("token_embedding",)), "position_embedding"),
        conv=("embeddings.patch_embedding",) if pictures else (),
        leftovers=("embeddings.position_ids",),
        heads=(head,),
    )


def _vit() -> Family:
    pooler, mask = "vit.pooler", "vit.embeddings.mask_token"
    return Family(
        prefix="vit.",
        others=("",),
        attention=_each("layers.*.attention", "q_proj", "k_proj", "v_proj", "o_proj"),
        feed_forward=_each("layers.*.mlp", "fc1", "fc2"),
        other_linear=("pooler.dense",),
        conv=("embeddings.patch_embeddings.projection",),
        renamed=(
            ("encoder.layer.*.attention.attention.query", "layers.*.attention.q_proj"),
            ("encoder.layer.*.attention.attention.key", "layers.*.attention.k_proj"),
            ("encoder.layer.*.attention.attention.value", "layers.*.attention.v_proj"),
            ("encoder.layer.*.attention.output.dense", "layers.*.attention.o_proj"),
            ("encoder.layer.*.intermediate.dense", "layers.*.mlp.fc1"),
            ("encoder.layer.*.output.dense", "layers.*.mlp.fc2"),
            ("encoder.layer.*", "layers.*"),
        ),
        parts=(pooler, mask),
        heads=(
            Head(name="ViTModel", task="FEATURE_EXTRACTION", without=(mask,)),
            Head(
                name="ViTForImageClassification",
                parameters=_affine("classifier"),
                labels="classifier.weight",
                without=(pooler, mask),
            ),
            Head(name="ViTForMaskedImageModeling", parameters=_affine("decoder.0"), without=(pooler,)),
        ),
    )


def _privacy_filter() -> Family:
    # A mixture of experts; only its attention and its head can be targets here, experts have no layout yet.
    return Family(
        prefix="model.",
        others=("",),
        attention=_each("layers.*.self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
        embedding=("embed_tokens",),
        leftovers=("rotary_emb.inv_freq",),
        heads=(
            Head(name="OpenAIPrivacyFilterModel", task="FEATURE_EXTRACTION"),
            Head(
                name="OpenAIPrivacyFilterForTokenClassification",
                task="TOKEN_CLS",
                parameters=_affine("score"),
                labels="score.weight",
            ),
        ),
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": _bert(),
        "camembert": _roberta("Camembert", head_first=True),
        "clip_text_model": _clip("text_model.", Head(name="CLIPTextModel", task="FEATURE_EXTRACTION")),
        "clip_vision_model": _clip("vision_model.", Head(name="CLIPVisionModel")),
        "distilbert": _distilbert(),
        "gemma2": _llama("Gemma2", answers=None, tied=True, lacking=("QuestionAnswering",)),
        "gpt2": _gpt2(),
        "gpt_neox": _gpt_neox(),
        "llama": _llama("Llama"),
        "mistral": _llama("Mistral", answers=None),
        "mt5": _t5("MT5"),
        "openai_privacy_filter": _privacy_filter(),
        "qwen2": _llama("Qwen2"),
        "qwen3": _llama("Qwen3"),
        "roberta": _roberta("Roberta"),
        "t5": _t5("T5"),
        "umt5": _t5("UMT5"),
        "vit": _vit(),
        "xlm-roberta": _roberta("XLMRoberta", head_first=True),
    }
)
"""``model_type`` of a configuration -> its architecture."""

BY_CLASS: Mapping[tuple[str, str], Family] = MappingProxyType(
    {
        ("clip_text_model", "CLIPTextModelWithProjection"): _clip(
            "text_model.",
            Head(name="CLIPTextModelWithProjection", parameters=("text_projection.weight",)),
            below=True,
        ),
        ("clip_vision_model", "CLIPVisionModelWithProjection"): _clip(
            "vision_model.",
            Head(name="CLIPVisionModelWithProjection", parameters=("visual_projection.weight",)),
            below=True,
        ),
    }
)
"""(``model_type``, class) -> the architecture, where a class names its modules otherwise than the others of it do."""
