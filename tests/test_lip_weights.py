"""Public lip weights: every form of file loads into the network, and `f2v weights convert` keeps what is used."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from cli.main import main
from model.avhubert import AVHubert, LipEncoder
from model.config import LipEncoderConfig
from model.lip_weights import DROPPED
from shards.errors import UserError
from tests.public_avhubert import public_weights

SMALL = LipEncoderConfig(
    stem=4, trunk=(4, 6, 8, 10), dim=16, layers=3, heads=2, ffn=24, pos_kernel=8, pos_groups=4, frozen=False
)
FAIRSEQ = ("fairseq", "fairseq.data", "fairseq.data.dictionary", "omegaconf", "omegaconf.dictconfig")


def save_fairseq(model: dict[str, Tensor], path: Path, new: bool = True) -> Path:
    """A checkpoint as fairseq lays it out, with objects of its packages: there while it is written and gone after."""
    for name in FAIRSEQ:
        sys.modules[name] = types.ModuleType(name)
    try:
        made = {}
        for package, name in (("fairseq.data.dictionary", "Dictionary"), ("omegaconf.dictconfig", "DictConfig")):
            made[name] = type(name, (), {"__module__": package})
            setattr(sys.modules[package], name, made[name])
        words, config = made["Dictionary"](), made["DictConfig"]()
        vars(words).update(symbols=["<s>", "0"], indices={"<s>": 0, "0": 1})
        vars(config).update(_content={"model": {"_name": "av_hubert"}, "parent": config})
        tree = {
            "args": None,
            "cfg": config,
            "model": model,
            "criterion": None,
            "optimizer_history": [{"criterion_name": "AVHubertCriterion", "best_loss": 1.5}],
            "task_state": {"dictionaries": [words], "s2s_tokenizer": None},
            "extra_state": {"train_iterator": {"epoch": 5}},
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        }
        torch.save(tree, path, _use_new_zipfile_serialization=new)
    finally:
        for name in FAIRSEQ:
            del sys.modules[name]
    return path


@pytest.fixture(scope="module")
def public() -> dict[str, Tensor]:
    return public_weights(SMALL)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight norm's tensors as torch names them since 2.0."""
    positions, modern = "encoder.pos_conv.0.", "encoder.pos_conv.0.parametrizations.weight.original"
    new = {f"{positions}weight_g": f"{modern}0", f"{positions}weight_v": f"{modern}1"}
    return {new.get(key, key): value for key, value in weights.items()}


def holds(network: AVHubert, weights: dict[str, Tensor]) -> None:
    """The network has these public tensors, each under its own name, and no others."""
    own = network.state_dict()
    assert own.keys() == {key for key in weights if not key.startswith(DROPPED)}
    for key, value in own.items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("wrapper", ["bare", "model", "zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "encoder.w2v_model.", "w2v_encoder.w2v_model."])
@pytest.mark.parametrize("modern", [False, True])
def test_public_checkpoints_load(
    tmp_path: Path, public: dict[str, Tensor], wrapper: str, prefix: str, modern: bool
) -> None:
    stored = {f"{prefix}{key}": value for key, value in (renamed(public) if modern else public).items()}
    if prefix:  # a fine-tuned network has lost its pretraining heads and gained others
        stored = {key: value for key, value in stored.items() if "final_proj" not in key and "label_embs" not in key}
        stored |= {"decoder.layers.0.fc1.weight": torch.zeros(2), "w2v_encoder.proj.weight": torch.zeros(2)}
    path = tmp_path / "large_vox_iter5.pt"
    if wrapper in ("zip", "legacy"):
        save_fairseq(stored, path, new=wrapper == "zip")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=True)
    else:
        torch.save(stored if wrapper == "bare" else {"model": stored}, path)
    encoder = LipEncoder(SMALL)
    encoder.load_public(path)
    holds(encoder.network, public)


def test_float16_tensors_load_as_float32(tmp_path: Path, public: dict[str, Tensor]) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in public.items()}
    encoder = LipEncoder(SMALL)
    encoder.load_public(save_fairseq(half, tmp_path / "half.pt"))
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}
    holds(encoder.network, {key: value.float() if value.is_floating_point() else value for key, value in half.items()})


def run(*arguments: object) -> int:
    return main(["weights", "convert", *map(str, arguments)])


@pytest.mark.parametrize("half", [False, True])
def test_converted_file(
    tmp_path: Path, public: dict[str, Tensor], half: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = save_fairseq(public, tmp_path / "large.pt"), tmp_path / "lips.safetensors"
    assert run(source, target, "--json", *(["--half"] if half else [])) == 0
    said = json.loads(capsys.readouterr().out)
    with safe_open(target, "pt") as stream:
        stored = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    kept = {key: value for key, value in public.items() if not key.startswith(DROPPED)}
    assert stored.keys() == kept.keys()
    for key, value in kept.items():
        expected = value.half() if half and value.ndim > 1 else value
        assert stored[key].dtype == expected.dtype, key
        assert torch.equal(stored[key], expected), key
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    data = target.read_bytes()
    assert said == {
        "output": str(target),
        "layers": 3,
        "dim": 16,
        "tensors": len(kept),
        "parameters": sum(value.numel() for key, value in kept.items() if not key.endswith(statistics)),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    encoder = LipEncoder(SMALL)
    encoder.load_public(target)
    holds(
        encoder.network, {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
    )
    # Again, in words, from the same tensors in another kind of file: the same bytes.
    torch.save(renamed(public), tmp_path / "plain.pt")
    assert run(tmp_path / "plain.pt", target, *(["--half"] if half else [])) == 0
    words = capsys.readouterr().out
    assert said["sha256"] in words
    assert f"lip_weights={target}" in words
    assert target.read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.pt", "lips.safetensors", "plain.pt"]


def test_what_cannot_be_converted_leaves_what_was_there(
    tmp_path: Path, public: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "c.pt", tmp_path / "lips.safetensors"
    target.write_bytes(b"before")

    def refuse(match: str, *arguments: object) -> None:
        assert run(*(arguments or (source, target))) == 2
        said = capsys.readouterr().err
        assert re.search(match, said), said
        assert said.count("\n") == 1
        assert target.read_bytes() == b"before"
        assert {path.name for path in tmp_path.iterdir()} <= {"c.pt", "lips.safetensors", "link.safetensors"}

    refuse(r"c\.pt: no such file; accept.*licence, fetch https://dl\.fbaipublicfiles\.com/.*f2v weights convert")
    for key in ("encoder.layers.1.fc2.bias", "layer_norm.bias", "encoder.layer_norm.weight", "encoder.pos_conv.0.bias"):
        torch.save({name: value for name, value in public.items() if name != key}, source)
        refuse(rf"{re.escape(key)} (is )?missing|missing {re.escape(key)}")
    torch.save(public | {"encoder.layers.1.fc1.weight": torch.zeros(2, 2)}, source)
    refuse(r"encoder\.layers\.1\.fc1\.weight has shape \[2, 2\], not \[24, 16\]")
    torch.save(public | {"encoder.pos_conv.0.weight_v": torch.zeros(16, 3, 8)}, source)
    refuse(r"pos_conv\.0\.weight_v has (another )?shape")
    torch.save(
        {name: value for name, value in public.items() if not name.startswith("feature_extractor_video")}, source
    )
    refuse("no video path")
    torch.save(public | {"post_extract_proj.weight": torch.full((16, 32), 1e6)}, source)
    refuse("post_extract_proj.weight is too large for float16", source, target, "--half")
    torch.save(public | {"layer_norm.bias": torch.full((32,), torch.nan)}, source)
    refuse("layer_norm.bias holds a number that is not finite")
    refuse(r"ends in \.safetensors", source, tmp_path / "lips.pt")
    (tmp_path / "link.safetensors").symlink_to(target)
    refuse("is the file to convert", target, tmp_path / "link.safetensors")
    refuse("cannot be read", tmp_path, target)
    refuse("damaged, cut short or no safetensors", *_cut(public, source, target))


def _cut(public: dict[str, Tensor], source: Path, target: Path) -> tuple[Path, Path]:
    data = save_safetensors(public)
    source.write_bytes(data[: len(data) // 2])
    return source, target


def test_wrong_checkpoints_are_named(tmp_path: Path, public: dict[str, Tensor]) -> None:
    encoder = LipEncoder(SMALL)
    path = tmp_path / "avhubert.pt"

    def refuse(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            encoder.load_public(path)
        assert "avhubert.pt" in str(caught.value)

    refuse("no such file; accept AV-HuBERT's licence, fetch https://dl.fbaipublicfiles.com/avhubert/.*weights convert")
    torch.save({key: value for key, value in public.items() if key != "layer_norm.bias"}, path)
    refuse("missing layer_norm.bias")
    torch.save(public | {"decoder.x": torch.zeros(1)}, path)
    refuse(r"unexpected decoder\.x")
    torch.save(public | {"layer_norm.bias": torch.zeros(3)}, path)
    refuse(r"layer_norm\.bias has shape \[3\], not \[32\]")
    torch.save({f"other.{key}": value for key, value in public.items()}, path)
    refuse("no video path.*e.g. other")
    torch.save({"model": {"feature_extractor_video.x": torch.zeros(1)}}, path)
    refuse("missing .*; missing .* and [0-9]+ more")
    torch.save({"model": 3}, path)
    refuse("no tensors by name")
    path.write_bytes(b"junk")
    refuse("no file that torch.save wrote")
