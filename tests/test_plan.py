"""The plan: what is not what a fresh build would make is run, what is stays, and the reason is said in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fingerprint import recipe_key
from pipeline.plan import Plan, make_plan
from pipeline.registry import STAGES
from pipeline.selection import Selection, refuse_waiting
from pipeline.stage import Clip
from shards.errors import UserError
from shards.manifest import ColumnRef, Manifest, ObjectRef, PackRef, Recipe, column_record, column_tar, pack_record
from shards.schema import FIELDS, SCHEMA_VERSION

NAMES = [kind.name for kind in STAGES]
READS = {
    "faces": (),
    "landmarks": ("faces",),
    "lips": ("landmarks",),
    "identity": ("faces",),
    "expression": ("faces", "landmarks"),
    "audio": (),
    "sync": ("audio", "faces"),
    "mel": ("audio",),
    "pitch": ("audio",),
    "energy": ("mel",),
    "speech": ("audio",),
}
"""What follows from what, said once more by hand."""
MEDIA = {kind.name for kind in STAGES if kind.media}


def recipe(value: int) -> Recipe:
    return Recipe(version=1, settings={"fmax": value}, weights="")


class World:
    """A dataset without objects: columns as nested tuples of all that they were made from."""

    def __init__(self, shards: int = 2) -> None:
        self.settings = dict.fromkeys(NAMES, 600)
        self.media = {f"train-{number:06d}": 0 for number in range(shards)}
        self.content: dict[tuple[str, str], Any] = {}
        self.refs: dict[str, dict[str, ColumnRef]] = {name: {} for name in NAMES}
        self.recipes: dict[str, dict[str, Recipe]] = {name: {} for name in NAMES}
        self.packs: dict[str, PackRef] = {}
        self.sizes: dict[str, int] = {}

    def shards(self) -> dict[str, list[Clip]]:
        return {
            shard: [Clip(f"{shard}{clip}", "uri", f"{number}") for clip in range(2)]
            for shard, number in self.media.items()
        }

    def ideal(self, stage: str, shard: str) -> Any:
        upstream = tuple(self.ideal(name, shard) for name in READS[stage])
        return (stage, self.settings[stage], self.media[shard] if stage in MEDIA else None, upstream)

    def plan(self, selection: Selection | None = None) -> Plan:
        recipes = {name: recipe(self.settings[name]) for name in NAMES}
        manifest = self.manifest() if self.sizes else None
        return make_plan(recipes, self.shards(), manifest, self.sizes, list(FIELDS), selection or Selection())

    def manifest(self) -> Manifest:
        nothing = ObjectRef(name="x", sha256="", bytes=0)
        return Manifest(
            schema_version=SCHEMA_VERSION,
            profile="offline",
            source="",
            config={},
            codebook=None,
            recipes=self.recipes,
            columns=self.refs,
            shards={},
            packs=self.packs,
            clips=nothing,
            quarantine=nothing,
            index=nothing,
        )

    def run(self, selection: Selection | None = None) -> set[tuple[str, str]]:
        """Do what the plan says; returns what was run."""
        plan = self.plan(selection)
        ran = set()
        for task in plan.tasks():
            stage, shard = task.stage, task.shard
            ran.add((stage, shard))
            for name, mark in task.reads.items():
                assert self.refs[name][shard].fingerprint == mark, "it would read a column that is not current"
            upstream = tuple(self.content[name, shard] for name in READS[stage])
            made_from = (task.recipe.settings["fmax"], self.media[shard] if stage in MEDIA else None, upstream)
            self.content[stage, shard] = (stage, *made_from)
            key = recipe_key(task.recipe)
            self.recipes[stage][key] = task.recipe
            facts = {
                "record": "",
                "sha256": "0" * 64,
                "bytes": 7,
                "clips": 2,
                "refused": 0,
                "seconds": 1.0,
                "recipe": key,
            }
            ref = ColumnRef(**{**task.model_dump(exclude={"stage", "shard", "recipe"}), **facts})
            self.refs[stage][shard] = ref
            self.sizes[column_record(stage, shard, ref.fingerprint)] = 1
            self.sizes[column_tar(stage, shard, ref.fingerprint, ref.sha256)] = 7
        for shard, pack in plan.packs.items():
            if pack.run:
                assert pack.marks == {name: self.refs[name][shard].fingerprint for name in NAMES}
                name = f"train/{shard}-000000000000.tar"
                facts = {
                    "record": "",
                    "behind": list(pack.behind),
                    "sha256": "",
                    "bytes": 9,
                    "clips": 2,
                    "frames": 50,
                    "refused": {},
                    "seconds": 1.0,
                }
                self.packs[shard] = PackRef(inputs=pack.inputs, name=name, **facts)
                self.sizes |= {name: 9, pack_record(shard, pack.inputs): 1}
        return ran


def test_first_build_runs_all_and_the_second_nothing() -> None:
    world = World()
    assert world.run() == {(stage, shard) for stage in NAMES for shard in world.media}
    assert world.run() == set()
    assert not any(pack.run for pack in world.plan().packs.values())


def test_reasons_are_words() -> None:
    world = World()
    world.run()
    world.settings["mel"] = 500
    world.media["train-000001"] = 5
    cells = world.plan().cells
    assert cells["mel"]["train-000000"].why == "fmax 600 -> 500"
    assert cells["mel"]["train-000001"].why == "fmax 600 -> 500; follows audio"
    assert cells["energy"]["train-000000"].why == "follows mel"
    assert cells["faces"]["train-000001"].why == "source clips changed"
    assert cells["pitch"]["train-000000"].state == "fresh"
    del world.refs["lips"]["train-000000"]
    assert world.plan().cells["lips"]["train-000000"].why.startswith("not built yet")
    ref = world.refs["pitch"]["train-000000"]
    world.sizes[column_tar("pitch", "train-000000", ref.fingerprint, ref.sha256)] = 6
    assert "missing or cut" in world.plan().cells["pitch"]["train-000000"].why


def test_narrowing() -> None:
    world = World(shards=4)
    world.run()
    world.settings |= {"faces": 1, "audio": 1}
    assert world.run(Selection(only=("audio",), shards="1-2")) == {("audio", "train-000001"), ("audio", "train-000002")}
    follow = {"audio", "sync", "mel", "pitch", "energy", "speech"}
    assert {stage for stage, _ in world.run(Selection(start="audio"))} == follow
    forced = world.run(Selection(only=("lips",), shards="0", force=True))
    assert forced == {("lips", "train-000000")}
    # A shard whose stages do not follow from each other says so.
    world.settings["mel"] = 3
    world.run(Selection(only=("mel",)))
    assert {shard: pack.behind for shard, pack in world.packs.items()} == {key: ["energy"] for key in world.media}
    world.run(Selection(only=("energy",), shards="0"))
    assert [shard for shard, pack in world.packs.items() if pack.behind] == list(world.media)[1:]
    left = world.plan(Selection(only=("energy",))).left()
    assert left["faces"] == {"fmax 600 -> 1": 4}
    # New shards wait for what they are made from.
    world.media["train-000009"] = 0
    assert world.run(Selection(only=("mel",))) == set()
    assert world.plan(Selection(only=("mel",))).cells["mel"]["train-000009"].why == "waits for audio"


@pytest.mark.parametrize(
    ("chosen", "built", "words"),
    [
        ({"pitch"}, {}, r"pitch needs audio: .*\(--only audio --only pitch\)"),
        ({"lips", "mel"}, {"faces"}, r"lips needs landmarks; mel needs audio: .*\(--only landmarks .*audio"),
        ({"energy"}, {"audio"}, r"\(--only mel --only energy\)"),
        ({"pitch", "audio"}, {}, None),
        ({"lips", "pitch"}, {"audio"}, None),
        ({"lips", "landmarks"}, {"faces"}, None),
    ],
)
def test_stages_of_which_none_can_run_are_refused(chosen: set[str], built: set[str], words: str | None) -> None:
    if words is None:
        return refuse_waiting(chosen, built)
    with pytest.raises(UserError, match=words):
        refuse_waiting(chosen, built)


@pytest.mark.parametrize("text", ["x", "7-", "3:1", "train:99", "5-3", ""])
def test_shards_that_pick_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="shards"):
        Selection(shards=text).pick_shards([f"train-{number:06d}" for number in range(8)])


def test_unknown_stage_and_reason_name_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no stage 'pich'.*pitch"):
        Selection(only=("pich",))
    with pytest.raises(UserError, match=r"no reason 'silence'.*silent"):
        Selection(requeue=("silence",))


changes = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(NAMES), st.integers(0, 2)),
    st.tuples(st.just("media"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("cut"), st.sampled_from(NAMES), st.integers(0, 2)),
)
selections = st.builds(
    lambda start, **others: Selection(start=None if others["only"] else start, **others),
    only=st.lists(st.sampled_from(NAMES), max_size=2).map(tuple),
    start=st.none() | st.sampled_from(NAMES),
    shards=st.none() | st.sampled_from(["0", "0-1", "train:1"]),
    force=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(changes, max_size=3), selections), max_size=5))
def test_any_history_ends_where_a_fresh_build_ends(history: list[tuple[list[Any], Selection]]) -> None:
    """Narrow builds in any order, with changes in between, then one whole build: all columns are made from what is
    asked for now, and nothing was run without a cause."""
    world = World()
    world.run()
    cut: set[tuple[str, str]] = set()
    for steps, selection in [*history, ([], Selection())]:
        for kind, *step in steps:
            shard = f"train-{step[-1] % 2:06d}"
            if kind == "set":
                world.settings[step[0]] = step[1]
            elif kind == "media":
                world.media[f"train-{step[0] % 2:06d}"] = step[1]
            else:
                ref = world.refs[step[0]][shard]
                world.sizes.pop(column_tar(step[0], shard, ref.fingerprint, ref.sha256), None)
                cut.add((step[0], shard))
        before = dict(world.content)
        old = {(stage, shard): ref for stage, row in world.refs.items() for shard, ref in row.items()}
        ran = world.run(selection)
        chosen = {(stage, shard) for stage in selection.stages() for shard in selection.pick_shards(world.media)}
        assert ran <= chosen
        for stage, shard in ran:
            changed = before[stage, shard] != world.content[stage, shard]
            upstream = any(
                old[stage, shard].reads[name] != world.refs[name][shard].fingerprint for name in READS[stage]
            )
            lost = (stage, shard) in cut
            assert changed or upstream or lost or selection.force
        cut -= ran
        if not selection.force:
            # Planning again finds nothing left of what was chosen.
            assert world.plan(selection).tasks() == []
    ideal = {(stage, shard): world.ideal(stage, shard) for stage in NAMES for shard in world.media}
    assert world.content == ideal
    assert not any(pack.behind for pack in world.packs.values())
    assert world.run() == set()


def test_attempts_make_new_columns_and_what_follows_is_made_anew() -> None:
    world = World(shards=1)
    world.run()
    mark = world.refs["mel"]["train-000000"].fingerprint
    recipes = {name: recipe(world.settings[name]) for name in NAMES}
    again = {("mel", "train-000000")}
    plan = make_plan(recipes, world.shards(), world.manifest(), world.sizes, list(FIELDS), Selection(), again)
    tasks = {task.stage: task for task in plan.tasks()}
    assert set(tasks) == {"mel", "energy"}
    assert tasks["mel"].attempt == 2
    assert tasks["mel"].fingerprint != mark
