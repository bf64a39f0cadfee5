"""Encoder-decoders: translation, summarisation, speech to text."""

from __future__ import annotations

from dataclasses import replace

from models.entry import Entry
from models.huggingface import inputs as kind
from models.huggingface.spec import VOCAB, Row, entry

TARGET = {0: "batch", 1: "target"}
TRANSLATION = kind.Modality(
    kind.cacheless(kind.translation),
    {**kind.TEXT_AXES, "decoder_input_ids": TARGET},
    kind.target_labels,
    {"labels": TARGET},
)
# Whisper's encoder accepts one length only: its positions are added unsliced.
SPEECH = replace(
    TRANSLATION,
    make=kind.cacheless(kind.speech),
    axes={"input_features": kind.BATCH, "decoder_input_ids": kind.BATCH},
    label_axes={"labels": kind.BATCH},
    seq=32,
    unseen_seq=32,
)

MARKERS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    **MARKERS,
}
MARIAN = {**BART, "decoder_vocab_size": VOCAB}
WHISPER = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
LED = {
    **BART,
    "attention_window": 4,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
}
PROPHET = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "disable_ngram_loss": True,
    **MARKERS,
}

TABLE: list[Row] = [
    ("t5", "T5ForConditionalGeneration", TRANSLATION, T5),
    (
        "t5-gated",
        "T5ForConditionalGeneration",
        TRANSLATION,
        {**T5, "feed_forward_proj": "gated-gelu"},
    ),
    ("mt5", "MT5ForConditionalGeneration", TRANSLATION, T5),
    ("umt5", "UMT5ForConditionalGeneration", TRANSLATION, T5),
    (
        "switch-transformers",
        "SwitchTransformersForConditionalGeneration",
        TRANSLATION,
        {**T5, "num_experts": 4},
    ),
    ("bart", "BartForConditionalGeneration", TRANSLATION, BART),
    ("mbart", "MBartForConditionalGeneration", TRANSLATION, BART),
    ("marian", "MarianMTModel", TRANSLATION, MARIAN),
    ("pegasus", "PegasusForConditionalGeneration", TRANSLATION, BART),
    ("blenderbot", "BlenderbotForConditionalGeneration", TRANSLATION, BART),
    ("m2m-100", "M2M100ForConditionalGeneration", TRANSLATION, BART),
    ("plbart", "PLBartForConditionalGeneration", TRANSLATION, BART),
    ("led", "LEDForConditionalGeneration", TRANSLATION, LED),
    ("longt5", "LongT5ForConditionalGeneration", TRANSLATION, {**T5, "local_radius": 3}),
    ("prophetnet", "ProphetNetForConditionalGeneration", TRANSLATION, PROPHET),
    ("whisper", "WhisperForConditionalGeneration", SPEECH, WHISPER),
]

ENTRIES: list[Entry] = [entry("seq2seq", *row) for row in TABLE]
