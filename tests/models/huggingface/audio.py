"""Audio models: waveforms through strided convolutions, spectrograms through patches."""

from __future__ import annotations

from dataclasses import replace

from models.entry import Entry
from models.huggingface import inputs as kind
from models.huggingface.spec import TINY, Row, entry

WAVEFORM = kind.Modality(
    kind.waveform,
    {"input_values": kind.TOKENS},
    kind.class_labels,
    {"labels": kind.BATCH},
    seq=400,
    unseen_seq=560,
)
FEATURES = replace(WAVEFORM, label=None)
SPECTROGRAM = replace(
    WAVEFORM, make=kind.spectrogram, axes={"input_values": kind.BATCH}, seq=32, unseen_seq=32
)

# Two strided convolutions and grouped positional convolution (with weight norm) before attention.
WAV2VEC2 = {
    **TINY,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
STABLE = {**WAV2VEC2, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
SEW = {**WAV2VEC2, "squeeze_factor": 2}
AST = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_mel_bins": 16,
    "max_length": 32,
    "patch_size": 8,
    "frequency_stride": 4,
    "time_stride": 4,
}

TABLE: list[Row] = [
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", WAVEFORM, WAV2VEC2),
    ("wav2vec2-stable", "Wav2Vec2ForSequenceClassification", WAVEFORM, STABLE),
    ("wav2vec2-ctc", "Wav2Vec2ForCTC", FEATURES, WAV2VEC2),
    ("hubert", "HubertForSequenceClassification", WAVEFORM, WAV2VEC2),
    ("wavlm", "WavLMForSequenceClassification", WAVEFORM, WAV2VEC2),
    ("unispeech-sat", "UniSpeechSatForSequenceClassification", WAVEFORM, WAV2VEC2),
    (
        "data2vec-audio",
        "Data2VecAudioForSequenceClassification",
        WAVEFORM,
        {**WAV2VEC2, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
    ),
    (
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForSequenceClassification",
        WAVEFORM,
        {**WAV2VEC2, "conv_depthwise_kernel_size": 7},
    ),
    ("sew", "SEWForSequenceClassification", WAVEFORM, SEW),
    ("ast", "ASTForAudioClassification", SPECTROGRAM, AST),
]

ENTRIES: list[Entry] = [entry("audio", *row) for row in TABLE]
