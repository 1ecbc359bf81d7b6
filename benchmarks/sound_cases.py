"""Rows of `benchmarks/stages.py` whose stages listen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.cases import Call, Case, Setting, each, ready, seconds_of, whole
from pipeline.batches import in_batches
from pipeline.networks.device import Precision, compute_type
from pipeline.stage import Clip, Item
from pipeline.stages.pitch import Pitch, PitchConfig, track_pitch
from pipeline.stages.speech import Speech, SpeechConfig
from shards.mel import from_pcm
from shards.schema import HOP


def spoken(items: Sequence[Item], seconds: float) -> list[Item]:
    """Clips of 1.2 to 6.2 s, LRS3's usual lengths, cut from the sound of the items laid end to end."""
    sound = np.concatenate([item.fields["wav"] for item in items])
    draw = np.random.default_rng(0)
    cut: list[Item] = []
    while seconds_of(cut) < seconds:
        length = 640 * int(draw.integers(30, 156))
        start = int(draw.integers(0, len(sound)))
        wave = np.take(sound, range(start, start + length), mode="wrap")
        cut.append(Item(Clip(f"clip{len(cut)}", "", ""), {"wav": wave}))
    return cut


def padded_share(items: Sequence[Item], budget: int) -> float:
    """Share of the frames that the stage's batches compute in vain."""
    computed = needed = 0

    def work(batch: list[int]) -> list[int]:
        nonlocal computed, needed
        computed += len(batch) * max(batch)
        needed += sum(batch)
        return batch

    for _ in in_batches([len(item.fields["wav"]) // HOP for item in items], int, budget, work):
        pass
    return 1 - needed / computed


def speech(setting: Setting, encoder: str, seconds: float) -> Case:
    """Clips of many lengths, their batches, units and timbre."""
    items = spoken(setting.items, seconds)
    waves = [from_pcm(item.fields["wav"]) for item in items]
    case = Case(f"speech {encoder}", seconds_of(items))
    if encoder == "hubert_large":
        case.peer, layer, clusters = hubert_peer(setting, waves), 24, 1000
    else:
        case.peer, layer, clusters = whisper_peer(setting, waves), 3, 100
    for precision in setting.precisions:
        config: dict[str, Any] = {"encoder": encoder, "layer": layer, "clusters": clusters, "precision": precision}
        config["centroids"] = setting.folder / f"{encoder}.npy"
        stage = ready(Speech(SpeechConfig(**config), setting.folder))
        network = stage._encoder
        case.ours[precision] = whole(stage, items)
        case.bare[precision] = each(*bare_speech(network, encoder, waves, precision, setting.device))
        if encoder == "hubert_large":
            case.padding = padded_share(items, network.budget)
    return case


def bare_speech(
    network: Any, encoder: str, waves: list[np.ndarray], precision: Precision, device: torch.device
) -> tuple[Callable[[Any], object], list[Any]]:
    """The network, and each clip as it takes it, alone and without padding."""
    if encoder == "hubert_large":
        from pipeline.networks.hubert import prepare

        inputs = [torch.from_numpy(prepare(wave))[None].to(device, compute_type(precision)) for wave in waves]
        return lambda x: network._network(x), inputs
    from pipeline.networks.whisper import whisper_mel

    mels = [torch.from_numpy(whisper_mel(wave).T)[None].to(device, compute_type(precision)) for wave in waves]
    return lambda mel: network(mel, 3), mels


def hubert_peer(setting: Setting, waves: list[np.ndarray]) -> Call:
    from transformers import HubertModel
    from transformers.utils.logging import disable_progress_bar

    from pipeline.networks.hubert import SAFE, large

    disable_progress_bar()
    usual: Any = HubertModel(large()).eval().requires_grad_(False)
    usual.save_pretrained((setting.folder / SAFE).parent)
    centroids = np.random.default_rng(1).standard_normal((1000, 1024)).astype(np.float32)
    np.save(setting.folder / "hubert_large.npy", centroids)
    usual.to(setting.device)
    return lambda: peers.hubert_units(usual, waves, centroids, setting.device)


def whisper_peer(setting: Setting, waves: list[np.ndarray]) -> Call:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    shape = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    usual: Any = WhisperEncoder(shape).eval().requires_grad_(False).to(setting.device)
    centroids = np.random.default_rng(1).standard_normal((100, 384)).astype(np.float32)
    np.save(setting.folder / "whisper_tiny.npy", centroids)
    return lambda: peers.whisper_units(usual, waves, centroids, setting.device)


def pitch(setting: Setting) -> Case:
    config = PitchConfig()
    waves = [from_pcm(item.fields["wav"]) for item in setting.items]
    usual = each(lambda wave: track_pitch(wave, config.fmin, config.fmax, "librosa"), waves)
    ours = whole(ready(Pitch(config)), setting.items)
    return Case("pitch", seconds_of(setting.items), usual, {"float64": ours})
