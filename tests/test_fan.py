"""FAN: layers and loader against the package face-alignment, crops and heat maps against its one-by-one functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.networks.fan import STACKS, Fan, FanNetwork, find_fan
from pipeline.networks.heatmaps import center_boxes, cut, decode_centroids, decode_peaks, raised_boxes
from pipeline.stage import Clip, Item
from pipeline.stages.landmarks import Landmarks, LandmarksConfig, key_frames, move_along
from shards.errors import UserError

face_alignment = pytest.importorskip("face_alignment", reason="pip install face-alignment: the reference network")

from face_alignment import utils as theirs  # noqa: E402
from face_alignment.models import FAN  # noqa: E402

# Their decoding as plain Python: compiling it takes longer than all these tests.
theirs.transform_np = theirs.transform_np.py_func
theirs._get_preds_fromhm = theirs._get_preds_fromhm.py_func


def published_names(stacks: int) -> set[str]:
    """Every tensor of the public files, from the layout that Bulat and Tzimiropoulos describe."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def block(name: str, wider: bool = False) -> set[str]:
        names = {f"{name}.bn{i}.{leaf}" for i in (1, 2, 3) for leaf in norm} | {
            f"{name}.conv{i}.weight" for i in (1, 2, 3)
        }
        if wider:
            names |= {f"{name}.downsample.0.{leaf}" for leaf in norm} | {f"{name}.downsample.2.weight"}
        return names

    def conv(name: str) -> set[str]:
        return {f"{name}.weight", f"{name}.bias"}

    names = conv("conv1") | {f"bn1.{leaf}" for leaf in norm}
    names |= block("conv2", wider=True) | block("conv3") | block("conv4", wider=True)
    for i in range(stacks):
        for level in (1, 2, 3, 4):
            for part in ("b1", "b2", "b3"):
                names |= block(f"m{i}.{part}_{level}")
        names |= block(f"m{i}.b2_plus_1") | block(f"top_m_{i}")
        names |= conv(f"conv_last{i}") | {f"bn_end{i}.{leaf}" for leaf in norm} | conv(f"l{i}")
        if i < stacks - 1:
            names |= conv(f"bl{i}") | conv(f"al{i}")
    return names


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """The package's FAN-4 with random weights, its norms' statistics those of noise, so that all layers are lively."""
    torch.manual_seed(0)
    network = FAN(4)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        network.train()(torch.rand(1, 3, 256, 256))
    return network.eval()


@pytest.fixture(scope="module")
def folder(reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as they are published: a TorchScript archive (to 1.4), a state dict (1.5), and ibug's two stacks."""
    folder = tmp_path_factory.mktemp("weights")
    with torch.no_grad():
        traced = torch.jit.trace(reference, torch.rand(1, 3, 64, 64), strict=False, check_trace=False)
    traced.save(folder / "2DFAN4-cd938726ad.zip")
    torch.save(reference.state_dict(), folder / "2DFAN4-11f355bf06.pth.tar", _use_new_zipfile_serialization=False)
    two = {name: value for name, value in reference.state_dict().items() if name in published_names(2)}
    torch.save(two, folder / "2dfan2.pth")
    return folder


def random_boxes(count: int, seed: int, whole: bool = False) -> np.ndarray:
    """Boxes in and partly beyond a frame of 300x200."""
    random = np.random.default_rng(seed)
    corner = random.uniform((-40, -40), (200, 120), (count, 2))
    boxes = np.concatenate([corner, corner + random.uniform(30, 160, (count, 2))], axis=1)
    return (boxes.round() if whole else boxes).astype(np.float32)


def their_crop(box: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and scale as the package's `get_landmarks_from_image` computes them from a detection."""
    x0, y0, x1, y1 = box.tolist()
    return np.array([x1 - (x1 - x0) / 2, y1 - (y1 - y0) / 2 - (y1 - y0) * 0.12]), (x1 - x0 + y1 - y0) / 165


@pytest.mark.parametrize("stacks", [4, 2])
def test_our_tensors_have_the_published_names(stacks: int, reference: torch.nn.Module) -> None:
    assert set(FanNetwork(stacks).state_dict()) == published_names(stacks)
    assert stacks != 4 or set(reference.state_dict()) == published_names(4)


@pytest.mark.parametrize("file", ["2DFAN4-cd938726ad.zip", "2DFAN4-11f355bf06.pth.tar"])
def test_layers_agree_with_the_package(file: str, folder: Path, reference: torch.nn.Module) -> None:
    crop = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    network = Fan(folder / file, "fan4").network
    with torch.no_grad():
        wanted = reference(crop)
        for last, maps in enumerate(wanted, start=1):
            torch.testing.assert_close(network(crop, last), maps, atol=1e-4 * float(maps.std()), rtol=1e-4)
        assert not torch.allclose(wanted[1], wanted[3], atol=0.1 * float(wanted[3].std()))


def test_two_stacks_of_ibug_pool_by_the_maximum(folder: Path, reference: torch.nn.Module) -> None:
    crop = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "avg_pool2d", lambda x, side, stride=None: torch.max_pool2d(x, side))
        wanted = reference(crop)[1]
    with torch.no_grad():
        maps = Fan(folder / "2dfan2.pth", "fan2").network(crop)
    torch.testing.assert_close(maps, wanted, atol=1e-4 * float(wanted.std()), rtol=1e-4)


def test_bfloat16_keeps_the_heat_maps(folder: Path, reference: torch.nn.Module) -> None:
    crop = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        wanted = reference(crop.permute(0, 3, 1, 2).float() / 255)[-1]
    maps = Fan(folder / "2DFAN4-11f355bf06.pth.tar", "fan4", flip=False, precision="bfloat16").heatmaps(crop)
    assert maps.dtype == torch.float32
    # Random layers spread rounding further than trained ones, whose maps are smooth.
    assert float(torch.nn.functional.cosine_similarity(maps.flatten(), wanted.flatten(), dim=0)) > 0.98


def test_points_are_the_packages(folder: Path, reference: torch.nn.Module) -> None:
    """Crop, mirrored crop, decoding and all, with the package's defaults; one after the other there, a batch here."""
    random = np.random.default_rng(5)
    frames = [random.integers(0, 256, (200, 300, 3), dtype=np.uint8) for _ in range(2)]
    boxes = random_boxes(2, seed=6)
    package = face_alignment.FaceAlignment.__new__(face_alignment.FaceAlignment)
    package.__dict__.update(device="cpu", dtype=torch.float32, flip_input=True, max_batch_size=1, verbose=False)
    package.landmarks_type = face_alignment.LandmarksType.TWO_D
    package.face_alignment_net = reference
    package.face_detector = type("Detector", (), {"reference_scale": 165})
    pairs = zip(frames, boxes, strict=True)
    wanted = [package.get_landmarks_from_image(frame, [box.tolist()])[0] for frame, box in pairs]
    fan = Fan(folder / "2DFAN4-cd938726ad.zip", "fan4")
    points = fan.points(frames, boxes)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, np.stack(wanted))
    np.testing.assert_array_equal(fan.points(frames[1:], boxes[1:]), points[1:])  # alone as in company
    assert fan.points([], boxes[:0]).shape == (0, 68, 2)


@pytest.mark.parametrize("whole", [False, True])
def test_crops_are_the_packages(whole: bool) -> None:
    frame = np.random.default_rng(7).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    boxes = random_boxes(60, seed=8, whole=whole)
    for box, corners in zip(boxes, raised_boxes(boxes), strict=True):
        np.testing.assert_array_equal(cut(frame, corners), theirs.crop(frame, *their_crop(box)))


def test_a_window_beyond_the_frame_is_black() -> None:
    frame = np.full((20, 30, 3), 255, np.uint8)
    assert not cut(frame, np.array([100, 100, 150, 150])).any()
    assert cut(frame, np.array([5, 5, 15, 15])).all()


def heat_maps(seed: int, levels: int | None) -> np.ndarray:
    """Random maps of two faces; few `levels` make many equal peaks; the first maps peak on borders and corners."""
    random = np.random.default_rng(seed)
    maps = random.normal(size=(2, 68, 64, 64)) if levels is None else random.integers(-levels, levels, (2, 68, 64, 64))
    for number, (row, column) in enumerate(
        [(0, 0), (0, 63), (63, 0), (63, 63), (0, 9), (9, 0), (63, 9), (9, 63), (1, 62)]
    ):
        maps[:, number, row, column] = 99
    return maps.astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([None, 1, 3]))
def test_peaks_are_read_as_the_package_reads_them(seed: int, levels: int | None) -> None:
    maps, boxes = heat_maps(seed, levels), random_boxes(2, seed)
    points = decode_peaks(torch.from_numpy(maps), boxes)
    for number, box in enumerate(boxes):
        _, wanted, _ = theirs.get_preds_fromhm(maps[number : number + 1], *their_crop(box))
        np.testing.assert_array_equal(points[number], wanted[0])


def test_centroids_are_those_of_the_cells_around_the_peak() -> None:
    maps = heat_maps(9, None)
    corners = center_boxes(np.array([[10, 20, 60, 90], [-30, 5, 81, 100]], np.float32))
    # side (50 + 70) / 2 / 0.55 = 109.09 about (35, 55); side 103 / 0.55 = 187.27 about (25.5, 52.5)
    np.testing.assert_array_equal(corners, [[-20, 0, 90, 110], [-68, -41, 120, 147]])
    points = decode_centroids(torch.from_numpy(maps), corners)
    for face, point in np.ndindex(2, 68):
        heat = maps[face, point].astype(np.float64)
        row, column = divmod(int(heat.argmax()), 64)
        rows, columns = np.mgrid[:64, :64]
        heat = np.where((rows - row) ** 2 + (columns - column) ** 2 <= 6.4**2, heat.clip(0), 0)
        cell = np.array([((columns + 0.5) * heat).sum(), ((rows + 0.5) * heat).sum()]) / heat.sum()
        low, high = corners[face, :2], corners[face, 2:]
        np.testing.assert_allclose(points[face, point], low + cell * (high - low) / 64, atol=1e-3)


def test_another_networks_file_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"FAN-4.*2dfan2\.pth.*missing"):
        Fan(folder / "2dfan2.pth", "fan4")
    (tmp_path / "cut.pth.tar").write_bytes((folder / "2DFAN4-11f355bf06.pth.tar").read_bytes()[:5000])
    with pytest.raises(UserError, match="FAN-4"):
        Fan(tmp_path / "cut.pth.tar", "fan4")


def test_a_folder_may_hold_either_published_file(folder: Path, tmp_path: Path) -> None:
    assert find_fan("fan2", folder) == folder / "2dfan2.pth"
    (tmp_path / "2DFAN4-cd938726ad.zip").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"cd938726ad\.zip.*sha256"):
        find_fan("fan4", tmp_path)


def rigid(frames: int, points: np.ndarray, seed: int) -> np.ndarray:
    """`points` [P, 2] carried along by a head that turns, nears and moves from frame to frame, [frames, P, 2]."""
    random = np.random.default_rng(seed)
    turn, scale = random.uniform(-0.5, 0.5, frames), random.uniform(0.7, 1.5, frames)
    matrices = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return np.einsum("ijf,pj->fpi", matrices, points) + random.uniform(-80, 80, (frames, 1, 2))


@given(frames=st.integers(1, 40), every=st.integers(1, 12), seed=st.integers(0, 99))
def test_between_key_frames_the_head_moves_as_tracked_and_the_shape_evenly(frames: int, every: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    five, shape = random.uniform(0, 100, (5, 2)), random.uniform(0, 100, (68, 2))
    opening = np.arange(frames)[:, None, None] * random.uniform(-1, 1, (68, 2))  # in the face's frame
    carried = rigid(frames, np.concatenate([five, np.eye(2), np.zeros((1, 2))]), seed)
    track, origin = carried[:, :5], carried[:, 7:]
    axes = carried[:, 5:7] - origin
    points = ((shape + opening) @ axes + origin).astype(np.float32)
    keys = key_frames(frames, every)
    assert keys[0] == 0
    assert keys[-1] == frames - 1
    assert (np.diff(keys) <= every).all()
    moved = move_along(points[keys], keys, track.astype(np.float32))
    assert moved.dtype == np.float32
    np.testing.assert_array_equal(moved[keys], points[keys])
    np.testing.assert_allclose(moved, points, atol=0.02)


@pytest.mark.parametrize(("every", "keys"), [(1, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), (4, [0, 4, 8, 9])])
def test_stage_runs_the_network_on_key_frames(
    every: int, keys: list[int], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = list(np.random.default_rng(10).integers(0, 256, (10, 60, 80, 3), dtype=np.uint8))
    boxes, five = random_boxes(10, 11), np.random.default_rng(12).uniform(0, 60, (10, 5, 2)).astype(np.float32)
    monkeypatch.setattr("pipeline.media.decode_video", lambda *_: iter(frames))
    seen: list[np.ndarray] = []

    def points(self: Fan, frames: list[np.ndarray], boxes: np.ndarray) -> np.ndarray:
        seen.extend(frames)
        return np.repeat(boxes.reshape(-1, 2, 2), 34, axis=1)

    monkeypatch.setattr(Fan, "points", points)
    stage = Landmarks(LandmarksConfig(network="fan2", every=every), folder)
    stage.setup()
    landmarks = stage.run(Item(Clip("k", "k.mp4", ""), {"boxes": boxes, "points5": five}))["landmarks"]
    assert [next(n for n, frame in enumerate(frames) if frame is one) for one in seen] == keys
    np.testing.assert_array_equal(landmarks[keys], np.repeat(boxes.reshape(-1, 2, 2), 34, axis=1)[keys])
    with pytest.raises(ValueError, match="zip"):
        stage.run(Item(Clip("k", "k.mp4", ""), {"boxes": boxes[:9], "points5": five[:9]}))


def test_every_frame_is_dlibs_own(clips: Path) -> None:
    from pipeline.media import decode_video
    from pipeline.networks.dlib_face import LandmarkPredictor

    path = str(next(clips.glob("01_*")))
    frames = [frame for frame, _ in zip(decode_video(path, 0, 0.6), range(15), strict=True)]
    five = np.array([(150, 130), (205, 130), (178, 165), (155, 195), (200, 195)]) + np.arange(15)[:, None, None]
    fields = {"boxes": np.zeros((15, 4), np.float32), "points5": five.astype(np.float32)}
    predictor = LandmarkPredictor()
    wanted = np.stack([predictor.points(*pair) for pair in zip(frames, fields["points5"], strict=True)])
    for every in (1, 4):
        stage = Landmarks(LandmarksConfig(every=every))
        stage.setup()
        found = stage.run(Item(Clip("k", path, "", start=0, end=0.6), fields))["landmarks"]
        keys = key_frames(15, every)
        np.testing.assert_array_equal(found[keys], wanted[keys])
        assert found.dtype == np.float32


def test_settings_without_effect_are_refused() -> None:
    for wrong in ({"network": "fan2", "stacks": 4}, {"stacks": 2}):
        with pytest.raises(ValueError, match="stacks"):
            LandmarksConfig(**wrong)
    assert LandmarksConfig(network="fan4", stacks=2).stacks == 2
    assert STACKS == {"fan4": 4, "fan2": 2}
