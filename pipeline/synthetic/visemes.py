"""From phonemes with times to mouth shapes per video frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GAP, WIDTH, PUCKER, TONGUE, LOWER_TEETH, TUCK = range(6)
"""Columns of a mouth track: lip opening (0 closed, 1 widest), mouth width (1 = spread), lips pushed forward (1) or
pressed thin (-1), height of the tongue, how far the lower teeth show, lower lip tucked under the upper teeth."""

_Shape = tuple[float, float, float, float, float, float]
_REST: _Shape = (0.0, 0.86, 0.0, 0.0, 0.0, 0.0)
_SPREAD: _Shape = (0.30, 1.12, 0.0, 0.35, 0.5, 0.0)
_MID: _Shape = (0.50, 1.0, 0.0, 0.4, 0.0, 0.0)
_OPEN: _Shape = (1.0, 0.95, 0.0, 0.35, 0.0, 0.0)
_ROUND: _Shape = (0.65, 0.68, 0.7, 0.2, 0.0, 0.0)
_TIGHT: _Shape = (0.22, 0.50, 1.0, 0.0, 0.0, 0.0)
_SCHWA: _Shape = (0.40, 0.88, 0.0, 0.3, 0.0, 0.0)
_NEAR: _Shape = (0.36, 1.02, 0.0, 0.4, 0.2, 0.0)

_VISEMES: dict[str, tuple[_Shape, ...]] = {
    "_": (_REST,),
    **dict.fromkeys(("b", "p", "m"), ((0.0, 0.82, -0.8, 0.0, 0.0, 0.0),)),
    **dict.fromkeys(("f", "v"), ((0.20, 0.92, 0.0, 0.0, 0.0, 1.0),)),
    **dict.fromkeys(("T", "D"), ((0.32, 0.92, 0.0, 1.0, 0.0, 0.0),)),
    **dict.fromkeys(("t", "d", "n", "t#"), ((0.24, 0.95, 0.0, 0.6, 0.5, 0.0),)),
    **dict.fromkeys(("s", "z"), ((0.24, 1.06, 0.0, 0.0, 1.0, 0.0),)),
    **dict.fromkeys(("tS", "dZ", "S"), ((0.32, 0.66, 0.8, 0.0, 1.0, 0.0),)),
    **dict.fromkeys(("l", "@L"), ((0.45, 0.92, 0.0, 0.9, 0.0, 0.0),)),
    "r": ((0.25, 0.68, 0.6, 0.2, 0.0, 0.0),),
    **dict.fromkeys(("w", "w#"), ((0.12, 0.46, 1.0, 0.0, 0.0, 0.0),)),
    **dict.fromkeys(("k", "g"), ((0.38, 0.9, 0.0, 0.2, 0.0, 0.0),)),
    "j": (_SPREAD,),
    **dict.fromkeys(("i:", "i"), (_SPREAD,)),
    "I": (_NEAR,),
    "E": ((0.60, 1.02, 0.0, 0.4, 0.0, 0.0),),
    "a": ((0.85, 1.0, 0.0, 0.35, 0.0, 0.0),),
    **dict.fromkeys(("A@", "A:"), (_OPEN,)),
    **dict.fromkeys(("0", "O:", "O@", "o@"), (_ROUND,)),
    "V": ((0.70, 0.92, 0.0, 0.3, 0.0, 0.0),),
    **dict.fromkeys(("@", "a#"), (_SCHWA,)),
    **dict.fromkeys(("u:", "U"), (_TIGHT,)),
    "eI": (_MID, _SPREAD),
    **dict.fromkeys(("aI", "aI2"), (_OPEN, _NEAR)),
    "aU": (_OPEN, _TIGHT),
    "oU": (_ROUND, _TIGHT),
    "i@": (_SPREAD, _SCHWA),
}

_STRICT = {"b": 6.0, "p": 6.0, "m": 6.0, "f": 5.0, "v": 5.0, "w": 3.0, "T": 3.0, "D": 2.0, "tS": 2.5, "dZ": 2.5}
"""How strongly a sound insists on its shape against its neighbours (dominance, Cohen and Massaro 1993); others 1."""

_LABIAL_LEAD = 0.03
_REACH = 0.032
_GRID = 0.005


def mouth_track(phonemes: Sequence[tuple[float, str]], frames: int, lead: float, fps: int = 25) -> np.ndarray:
    """Mouth shapes of a sentence, sampled at the middle of each video frame.

    Each phoneme (each half of a diphthong) holds its shape for its time; shapes are averaged under a Gaussian of 32 ms
    weighted by how strict a sound is, so that neighbours blend while `b p m` still close the lips.

    Args:
        phonemes: (begin in seconds, espeak-ng mnemonic); the last one lasts until the end.
        frames: number of video frames F.
        lead: seconds of rest before the first phoneme's time zero.

    Returns:
        float32 (F, 6), columns `GAP` to `TUCK`.
    """
    count = int(round(frames / fps / _GRID))
    times = (np.arange(count) + 0.5) * _GRID
    shapes = np.tile(np.asarray(_REST), (count, 1))
    weights = np.ones(count)
    begins = [begin + lead for begin, _ in phonemes] + [frames / fps]
    for i, (_, symbol) in enumerate(phonemes):
        # The lips meet before a closure is heard.
        begin = begins[i] - (_LABIAL_LEAD if _STRICT.get(symbol, 1.0) >= 5 else 0.0)
        targets = _VISEMES.get(symbol, (_SCHWA,))
        edges = np.linspace(begin, begins[i + 1], len(targets) + 1)
        for j, shape in enumerate(targets):
            inside = (times >= edges[j]) & (times < edges[j + 1])
            shapes[inside] = shape
            weights[inside] = _STRICT.get(symbol, 1.0)
    reach = int(4 * _REACH / _GRID)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * _GRID / _REACH) ** 2)
    norm = np.convolve(np.pad(weights, reach, mode="edge"), kernel, mode="valid")
    smooth = np.stack(
        [np.convolve(np.pad(c * weights, reach, mode="edge"), kernel, mode="valid") / norm for c in shapes.T], axis=1
    )
    # A remainder of opening that blending leaves in a closure is taken away, so closed lips are closed.
    smooth[:, GAP] = np.maximum(0.0, smooth[:, GAP] - 0.07) / 0.93
    middles = (np.arange(frames) + 0.5) / fps
    return np.stack([np.interp(middles, times, c) for c in smooth.T], axis=1).astype(np.float32)
