"""DNSMOS P.835 (Reddy et al. 2022): quality of speech, background and the whole, without a reference.

Microsoft's network `sig_bak_ovr.onnx`, which the package speechmos carries, run by onnxruntime.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.evaluation.packages import PackageFile
from shards.schema import SAMPLE_RATE

FILE = PackageFile("DNSMOS", "speechmos", "speechmos", "0.0.1.1", "dnsmos_models/sig_bak_ovr.onnx")
SECONDS = 9.01
"""Length of the network's input."""
KEYS = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
"""Figures in the order of the network's outputs."""
CURVES = (
    (-0.08397278, 1.22083953, 0.0052439),
    (-0.13166888, 1.60915514, -0.39604546),
    (-0.06766283, 1.11546468, 0.04602535),
)
"""Polynomials of degree two, highest power first, that fit the outputs to the ratings of P.835."""


class Dnsmos:
    """The network, on the processor.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(FILE.path()), options, providers=["CPUExecutionProvider"])

    def __call__(self, wave: NDArray[np.float32]) -> dict[str, float]:
        """Figures of a mono 16 kHz signal [N] in -1..1, N at least 1.

        A clip shorter than 9.01 s is doubled until it is not; windows follow each other by a second; the mean counts.
        """
        window = int(SECONDS * SAMPLE_RATE)
        while len(wave) < window:
            wave = np.concatenate([wave, wave])
        ratings = []
        for second in range(int(len(wave) // SAMPLE_RATE - SECONDS) + 1):
            # The public protocol rounds a window's end down from a float: some windows come out a sample short, and
            # those are passed over there too.
            piece = wave[second * SAMPLE_RATE : int((second + SECONDS) * SAMPLE_RATE)]
            if len(piece) == window:
                raw = self._session.run(None, {"input_1": piece[None].astype(np.float32)})[0][0]
                ratings.append([np.polyval(curve, value) for curve, value in zip(CURVES, raw, strict=True)])
        return dict(zip(KEYS, map(float, np.mean(ratings, axis=0)), strict=True))
