"""Models of sound: samples or spectrograms in, text, units or sound out."""

from typing import Any

from torch import Tensor, nn

from .family import Family, noise, of_transformers, tokens

FRONT: dict[str, Any] = {
    "conv_dim": [64, 64, 64],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
MELS = 32


def samples(model: nn.Module) -> dict[str, Tensor]:
    return {"input_values": noise(2, 640)}


def one_channel(model: nn.Module) -> dict[str, Tensor]:
    return {"input_values": noise(2, 1, 640)}


def spectrogram(model: nn.Module) -> dict[str, Tensor]:
    return {"input_features": noise(2, 32, MELS)}


def spectrogram_to_text(model: nn.Module) -> dict[str, Tensor]:
    return {
        "input_features": noise(2, MELS, 64),
        "decoder_input_ids": tokens(length=8, seed=1),
    }


def audio(name: str, auto: str, inputs: Any, output: str = "logits", **fields: Any) -> Family:
    return of_transformers(name, "audio", auto, inputs, output, **fields)


FAMILIES: list[Family] = [
    audio(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        spectrogram_to_text,
        generates=True,
        num_mel_bins=MELS,
        max_source_positions=32,
        max_target_positions=32,
        begin_suppress_tokens=None,
    ),
    audio("wav2vec2", "AutoModelForCTC", samples, **FRONT),
    audio(
        "wav2vec2_stable",
        "AutoModelForCTC",
        samples,
        model_type="wav2vec2",
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        **FRONT,
    ),
    audio("hubert", "AutoModelForCTC", samples, **FRONT),
    audio("wavlm", "AutoModelForCTC", samples, **FRONT),
    audio(
        "wav2vec2_conformer",
        "AutoModelForCTC",
        samples,
        model_type="wav2vec2-conformer",
        conv_depthwise_kernel_size=7,
        **FRONT,
    ),
    audio(
        "wav2vec2_bert",
        "AutoModelForCTC",
        spectrogram,
        model_type="wav2vec2-bert",
        feature_projection_input_dim=MELS,
        conv_depthwise_kernel_size=7,
    ),
    audio(
        "audio_spectrogram_transformer",
        "AutoModelForAudioClassification",
        lambda model: {"input_values": noise(2, 32, MELS)},
        model_type="audio-spectrogram-transformer",
        num_mel_bins=MELS,
        max_length=32,
        frequency_stride=8,
        time_stride=8,
    ),
    audio(
        "speech_to_text",
        "AutoModelForSpeechSeq2Seq",
        lambda model: {"input_features": noise(2, 64, MELS), "decoder_input_ids": tokens(length=8)},
        generates=True,
        model_type="speech_to_text",
        max_source_positions=64,
        max_target_positions=32,
        input_feat_per_channel=MELS,
        conv_channels=64,
    ),
    audio(
        "speecht5",
        "AutoModelForSpeechSeq2Seq",
        lambda model: {"input_values": noise(2, 640), "decoder_input_ids": tokens(length=8)},
        **FRONT,
    ),
    audio(
        "encodec",
        "AutoModel",
        one_channel,
        "audio_values",
        hidden_size=64,
        num_filters=16,
        upsampling_ratios=[4, 2],
        codebook_size=64,
        target_bandwidths=[24.0],
        sampling_rate=24000,
    ),
    audio(
        "moonshine",
        "AutoModelForSpeechSeq2Seq",
        lambda model: {"input_values": noise(2, 6400), "decoder_input_ids": tokens(length=8)},
        generates=True,
    ),
]
