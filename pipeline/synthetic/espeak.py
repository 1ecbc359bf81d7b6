"""English speech with phoneme times from espeak-ng, through the shared library that `espeakng-loader` packages."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import UserError

SAMPLE_RATE = 16_000
_NATIVE_RATE = 22_050

# espeak-ng's speak_lib.h
_OUTPUT_SYNCHRONOUS = 2
_INIT_PHONEME_EVENTS, _INIT_DONT_EXIT = 0x0001, 0x8000
_CHARS_UTF8, _PHONEME_INPUT = 0x001, 0x100
_RATE, _PITCH, _RANGE = 1, 3, 4
_EVENT_END_OF_LIST, _EVENT_PHONEME = 0, 7


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Speech:
    """One spoken sentence.

    Attributes:
        samples: float32 (n,), 16 kHz, within [-1, 1].
        phonemes: (begin in seconds, espeak-ng mnemonic) in order of time, stress marks removed, e.g. `(0.31, "u:")`.
            Pauses are `_`; the last entry is the pause that follows the sentence.
    """

    samples: np.ndarray
    phonemes: tuple[tuple[float, str], ...]


def speak(text: str, voice: str, rate: int = 150, pitch: int = 50, pitch_range: int = 50, seed: int = 0) -> Speech:
    """Speak a sentence. The same arguments give the same samples, in any order of calls and in any process.

    espeak-ng keeps its state in the library's globals, and its noise and flutter depend on everything said before.
    So each call loads the library, speaks and unloads it (4 ms). Not thread safe: one call at a time per process.

    Args:
        text: English; phonemes may be given between double brackets, `[['eI]]`.
        voice: a language of espeak-ng, with `+variant` if wanted: `en-us+m3`.
        rate: words per minute, 80 to 450.
        pitch, pitch_range: 0 to 100; 50 is the voice's own.
        seed: of espeak-ng's noise.

    Raises:
        UserError: `espeakng-loader` is not installed or has no library for this machine, or there is no such voice.
    """
    from scipy.signal import resample_poly

    _check_variant(voice)
    wave, events = _synthesise(text, voice, {_RATE: rate, _PITCH: pitch, _RANGE: pitch_range}, seed)
    samples = resample_poly(wave.astype(np.float64) / 32768, 320, 441)  # 22050 * 320 / 441 = 16000
    phonemes = tuple((sample / _NATIVE_RATE, _plain(symbol)) for sample, symbol in events)
    return Speech(np.clip(samples, -1, 1).astype(np.float32), phonemes)


def _synthesise(
    text: str, voice: str, parameters: dict[int, int], seed: int
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    import _ctypes

    library = _load()
    chunks: list[np.ndarray] = []
    events: list[tuple[int, str]] = []

    @_Callback
    def collect(wave: Any, count: int, event: Any) -> int:
        if wave and count > 0:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type != _EVENT_END_OF_LIST:
            if event[i].type == _EVENT_PHONEME:
                events.append((event[i].sample, event[i].id.string.decode()))
            i += 1
        return 0

    try:
        options = _INIT_PHONEME_EVENTS | _INIT_DONT_EXIT
        rate = library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, str(_data()).encode(), options)
        if rate != _NATIVE_RATE:
            raise UserError(f"espeak-ng cannot start with the data in {_data()}: reinstall espeakng-loader")
        library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
        library.espeak_ng_SetRandSeed(seed)
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}: give a language and variant such as en-us+m3")
        for parameter, value in parameters.items():
            library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode()
        flags = _CHARS_UTF8 | _PHONEME_INPUT
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, flags, None, None)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)  # its globals go with it: the next call starts afresh
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int16), events


def _plain(symbol: str) -> str:
    """A mnemonic without stress marks; any pause becomes `_`."""
    symbol = symbol.lstrip("',")
    return "_" if symbol.startswith("_") else symbol


def _load() -> ctypes.CDLL:
    loader = _loader()
    try:
        return ctypes.CDLL(loader.get_library_path())
    except OSError as error:
        raise UserError(f"espeakng-loader has no espeak-ng library for this machine: {error}") from None


def _data() -> Path:
    return Path(_loader().get_data_path())


def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError:
        raise UserError("speech needs espeak-ng: pip install espeakng-loader") from None
    return espeakng_loader


def _check_variant(voice: str) -> None:
    """espeak-ng ignores an unknown variant without a word; here it is an error."""
    _, plus, variant = voice.partition("+")
    if plus and not (_data() / "voices" / "!v" / variant).is_file():
        raise UserError(f"espeak-ng has no variant {variant!r} (voice {voice!r}): see {_data() / 'voices' / '!v'}")
