"""Text encoders: one pass over the whole sequence, attention in both directions."""

from __future__ import annotations

from dataclasses import replace

from models.entry import Entry
from models.huggingface import inputs as kind
from models.huggingface.spec import TINY, Row, entry

TEXT = kind.Modality(kind.text, kind.TEXT_AXES, kind.token_labels, {"labels": kind.TOKENS})
UNMASKED = replace(TEXT, make=kind.text_without_mask, axes={"input_ids": kind.TOKENS})
TAGGED = replace(TEXT, label=kind.tag_labels)
CLASSED = replace(TEXT, label=kind.class_labels, label_axes={"labels": kind.BATCH})
SPAN = replace(
    TEXT,
    label=kind.span_labels,
    label_axes={"start_positions": kind.BATCH, "end_positions": kind.BATCH},
)
PLAIN = kind.Modality(kind.text, kind.TEXT_AXES)

DISTIL = {
    "vocab_size": 101,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
# Padding id 1 shifts position ids by 2, as in the published RoBERTa family.
ROBERTA = {**TINY, "pad_token_id": 1, "bos_token_id": 0}
DISENTANGLED = {
    **TINY,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "max_relative_positions": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
}
MODERN = {
    **TINY,
    "global_attn_every_n_layers": 2,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
REMBERT = {**TINY, "input_embedding_size": 16, "output_embedding_size": 32}
SQUEEZE = {**TINY, "embedding_size": 32}
MOBILE = {
    **TINY,
    "embedding_size": 16,
    "intra_bottleneck_size": 16,
    "num_feedforward_networks": 2,
    "hidden_size": 32,
}
XLNET = {"vocab_size": 101, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}

TABLE: list[Row] = [
    ("bert", "BertForMaskedLM", TEXT, TINY),
    ("bert-sentence", "BertModel", PLAIN, TINY),
    ("roberta", "RobertaForMaskedLM", TEXT, ROBERTA),
    ("roberta-span", "RobertaForQuestionAnswering", SPAN, ROBERTA),
    ("xlm-roberta", "XLMRobertaForTokenClassification", TAGGED, ROBERTA),
    ("camembert", "CamembertForSequenceClassification", CLASSED, ROBERTA),
    ("distilbert", "DistilBertForSequenceClassification", CLASSED, DISTIL),
    ("albert", "AlbertForMaskedLM", TEXT, {**TINY, "embedding_size": 16}),
    ("electra", "ElectraForMaskedLM", TEXT, {**TINY, "embedding_size": 16}),
    ("deberta-v2", "DebertaV2ForMaskedLM", TEXT, DISENTANGLED),
    ("mpnet", "MPNetForMaskedLM", TEXT, ROBERTA),
    ("modernbert", "ModernBertForMaskedLM", TEXT, MODERN),
    ("eurobert", "EuroBertForMaskedLM", TEXT, {**TINY, "num_key_value_heads": 4}),
    ("nomic-bert", "NomicBertForMaskedLM", TEXT, TINY),
    ("fnet", "FNetForMaskedLM", UNMASKED, TINY),
    ("roformer", "RoFormerForMaskedLM", TEXT, {**TINY, "embedding_size": 32}),
    ("squeezebert", "SqueezeBertForMaskedLM", TEXT, SQUEEZE),
    ("mobilebert", "MobileBertForMaskedLM", TEXT, MOBILE),
    ("megatron-bert", "MegatronBertForMaskedLM", TEXT, TINY),
    ("rembert", "RemBertForMaskedLM", TEXT, REMBERT),
    ("convbert", "ConvBertForMaskedLM", TEXT, {**TINY, "embedding_size": 16}),
    ("ernie", "ErnieForMaskedLM", TEXT, TINY),
    ("esm", "EsmForMaskedLM", TEXT, {**ROBERTA, "mask_token_id": 3}),
    ("xlnet", "XLNetLMHeadModel", TEXT, XLNET),
]

ENTRIES: list[Entry] = [entry("encoder", *row) for row in TABLE]
