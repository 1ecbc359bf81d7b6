"""What a build shows while it runs: rates, times to go, lines, events, and the terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.board import Board
from pipeline.config import BuildConfig
from pipeline.cost import Cost, Look, Node
from pipeline.estimate import Estimate
from pipeline.screen import Screen
from pipeline.stage import Reason
from shards.config import load_config

LOOK = Look("faces", "train-000000", 0, 100, 0, 0.1, 10**8, 0.0, None, "h1", "n1", "")
COST = Cost(20.0, 15.0, 2.0, 1000, 3000, 5 * 10**8, "h1", "n1", 97, 3)
SHARDS = [f"train-{number:06d}" for number in range(4)]


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pipeline.board.monotonic", clock)
    return clock


def config(**run: Any) -> BuildConfig:
    return load_config(BuildConfig, base={"run": run})


def task(stage: str = "faces", shard: str = SHARDS[0]) -> Any:
    return SimpleNamespace(stage=stage, shard=shard)


def did(cost: Cost | None = COST, ran: bool = True) -> Any:
    return SimpleNamespace(result=None, ran=ran, cost=cost)


def begun(tmp_path: Any, clock: Clock, **options: Any) -> Board:
    """Two stages over four shards of 100 clips; faces of the first two shards have workers since second 0."""
    board = Board(str(tmp_path / "ds"), config(), **options)
    board.begin([task(stage, shard) for stage in ("faces", "mel") for shard in SHARDS], dict.fromkeys(SHARDS, 100))
    for shard in SHARDS[:2]:
        board.given(task(shard=shard), "h1")
    return board


def test_a_stage_moves_inside_its_tasks_and_says_when_it_will_be_through(tmp_path: Any, clock: Clock) -> None:
    board = begun(tmp_path, clock, quiet=True)
    for seconds in (2, 4, 6, 8, 10):
        clock.now = 1000 + seconds
        board.looks([replace(LOOK, shard=shard, done=2 * seconds) for shard in SHARDS[:2]])
    faces = board.stages["faces"]
    assert faces.through() == 40
    assert faces.rate() == pytest.approx(4)  # two workers, 2 clips/s each
    assert faces.eta() == pytest.approx(360 / 4)
    # A column that was there counts as done, and not into the rate.
    board.given(task(shard=SHARDS[2]), "h1")
    board.done(task(shard=SHARDS[2]), did(None, ran=False))
    assert (faces.through(), faces.found, faces.rate()) == (140, 100, pytest.approx(4))
    assert faces.eta() == pytest.approx(260 / 4)
    assert (faces.waiting, board.stages["mel"].waiting) == (1, 4)


def test_clips_that_an_earlier_stage_refused_are_skipped_but_are_of_the_shard(tmp_path: Any, clock: Clock) -> None:
    board = begun(tmp_path, clock, quiet=True)
    clock.now += 5
    board.looks([replace(LOOK, done=20, total=40, refused=7)])
    assert board.stages["faces"].through() == 50
    assert board.stages["faces"].quarantined() == 7


def test_a_rate_is_that_of_the_last_minute(tmp_path: Any, clock: Clock) -> None:
    board = begun(tmp_path, clock, quiet=True)
    done = 0.0
    for second in range(1, 31):  # 2 clips/s for 30 s, then a clip in 4 s
        clock.now = 1000 + second
        done += 2
        board.looks([replace(LOOK, done=int(done))])
    for second in range(34, 130, 4):
        clock.now = 1000 + second
        done += 1
        board.looks([replace(LOOK, done=int(done))])
    assert board.stages["faces"].rate() == pytest.approx(1 / 4, rel=0.05)


def test_work_that_is_lost_is_to_be_done_again_and_the_rate_stays(
    tmp_path: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    board = begun(tmp_path, clock)
    clock.now += 10
    board.looks([replace(LOOK, shard=shard, done=30) for shard in SHARDS[:2]])
    capsys.readouterr()
    board.lost(task(), "hang", 10.2, "h1")
    faces = board.stages["faces"]
    assert (faces.through(), faces.rate(), faces.waiting) == (30, pytest.approx(6), 3)
    assert capsys.readouterr().err == "a worker on h1 hung: faces train-000000 begins again, 10 s of work lost\n"
    board.lost(task(), "node", 1, "h1")  # waits already
    assert faces.waiting == 3


def test_names_from_outside_do_not_reach_the_terminal_as_they_are(
    tmp_path: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    board = begun(tmp_path, clock)
    board.poison(task(), "a\x1b[2Jb", Reason.CRASH, "first\nsecond \udcff")
    assert capsys.readouterr().err == "a\\x1b[2Jb: to quarantine by faces (crash): first\\nsecond \\udcff\n"


def test_the_time_to_go_counts_all_stages_by_what_they_are_known_to_take(tmp_path: Any, clock: Clock) -> None:
    board = begun(tmp_path, clock, quiet=True)
    clock.now += 20
    for before, after in zip(SHARDS[:2], SHARDS[2:], strict=True):
        board.done(task(shard=before), did())
        board.given(task(shard=after), "h1")
    # mel was never timed: nobody knows.
    assert board.total_eta() is None
    board.expect(Estimate(0, {"mel": 80.0}, 0, 0, [], 2, {"mel": 400}))
    # faces: 200 clips at 40 s of work for 200; mel: 400 at 0.2 s; two workers.
    assert board.total_eta() == pytest.approx((40 + 80) / 2)


def test_workers_with_gpus_do_not_help_the_others(tmp_path: Any, clock: Clock) -> None:
    board = Board(str(tmp_path), config(gpus=1))
    board.begin([task("speech"), task("mel")], {SHARDS[0]: 100})
    board.expect(Estimate(0, {"speech": 50.0, "mel": 10.0}, 0, 0, [], 2, {"speech": 100, "mel": 100}))
    board.given(task("speech"), "h1")
    board.given(task("mel"), "h1")
    assert board.total_eta() == pytest.approx(50)


def test_processors_and_gpus_in_use(tmp_path: Any, clock: Clock) -> None:
    board = begun(tmp_path, clock, quiet=True)
    for seconds, one, other in ((0, 5.0, 7.0), (10, 14.0, 12.0)):
        clock.now = 1000 + seconds
        looks = [replace(LOOK, cpu=one, gpu=0.5), replace(LOOK, shard=SHARDS[1], cpu=other, gpu=0.25)]
        board.looks(looks)
    assert board.stages["faces"].cpu() == pytest.approx(0.9 + 0.5)
    assert board.stages["faces"].gpu() == pytest.approx(0.375)


def test_lines_of_a_log_come_every_ten_seconds(tmp_path: Any, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    board = begun(tmp_path, clock)
    board.cluster([Node("n1", "h1", 2, 0, "cpu", True)])
    for seconds in range(2, 21, 2):
        clock.now = 1000 + seconds
        board.looks([replace(LOOK, shard=shard, done=2 * seconds, cpu=seconds * 0.8) for shard in SHARDS[:2]])
    assert capsys.readouterr().err.splitlines() == [
        "faces: 40/400 clips, 4 clips/s, ETA 1:30, 2 workers, CPU 1.6",
        "build: 40/800 clip stages, 10 s, 2 workers on 1 machine",
        "faces: 80/400 clips, 4 clips/s, ETA 1:20, 2 workers, CPU 1.6",
        "build: 80/800 clip stages, 20 s, 2 workers on 1 machine",
    ]
    with board:
        pass
    assert capsys.readouterr().err == "build: 80/800 clip stages, 20 s\n"


def test_events_are_json_lines_on_standard_error(
    tmp_path: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with begun(tmp_path, clock, json=True) as board:
        board.cluster([Node("n1", "h1", 2, 0, "cpu", True), Node("n2", "h2", 4, 1, "gpu", True)])
        clock.now += 10
        board.looks([replace(LOOK, done=30, refused=1)])
        board.cluster([Node("n1", "h1", 2, 0, "cpu", True)])
        board.lost(task(shard=SHARDS[1]), "node", 10, "h2")
        board.poison(task(), "clip-7", Reason.FAULT, "a message")
        board.note("more room")
        board.done(task(), did())
        name = board.record("done")
    out, err = capsys.readouterr()
    assert out == ""
    events = [json.loads(line) for line in err.splitlines()]
    names = "begin given given node node progress node lost poison note done progress end"
    assert [event["event"] for event in events] == names.split()
    assert all(event["time"].endswith("Z") for event in events)
    progress = events[5]
    assert (progress["done"], progress["total"], progress["workers"], progress["nodes"]) == (30, 800, 2, 2)
    faces = progress["stages"]["faces"]
    assert (faces["done"], faces["quarantined"], faces["running"], faces["waiting"]) == (30, 1, 2, 2)
    assert (faces["clips_per_second"], faces["eta"]) == (3, pytest.approx(370 / 3, abs=0.1))
    assert [(event["host"], event["alive"]) for event in events if event["event"] == "node"] == (
        [("h1", True), ("h2", True), ("h2", False)]
    )
    assert events[8]["reason"] == "fault"
    assert events[10]["cost"]["seconds"] == 20
    assert events[-1]["record"] == name


def test_a_quiet_board_says_nothing(tmp_path: Any, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for json_too in (False, True):
        with begun(tmp_path, clock, json=json_too, quiet=True) as board:
            clock.now += 60
            board.looks([LOOK])
            board.lost(task(), "crash", 3, "h1")
            board.note("something")
    assert capsys.readouterr() == ("", "")


class Terminal:
    """A terminal of `columns`: what its lines show after carriage returns, moves up and clearing."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column, self.writes = columns, [""], 0, 0, 0

    def isatty(self) -> bool:
        return True

    def flush(self) -> None: ...

    def write(self, text: str) -> int:
        self.writes += 1
        rest = text
        while rest:
            if rest.startswith("\x1b["):
                end = next(at for at in range(2, len(rest)) if rest[at].isalpha())
                self.control(rest[end], rest[2:end])
                rest = rest[end + 1 :]
            else:
                self.put(rest[0])
                rest = rest[1:]
        return len(text)

    def control(self, what: str, number: str) -> None:
        if what == "A":
            assert int(number) <= self.row, "moves above what was written"
            self.row -= int(number)
        elif what in "KJ":
            self.lines[self.row] = self.lines[self.row][: self.column]
            if what == "J":
                del self.lines[self.row + 1 :]

    def put(self, letter: str) -> None:
        if letter == "\r":
            self.column = 0
        elif letter == "\n":
            self.row, self.column = self.row + 1, 0
        else:
            if self.column == self.columns:
                self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row + 1 - len(self.lines))
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1
        self.lines += [""] * (self.row + 1 - len(self.lines))


Lines = st.lists(st.text("abc 1/#", max_size=30).map(str.rstrip), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(2, 8), st.lists(st.one_of(Lines, st.none()), max_size=12))
def test_the_last_picture_and_every_note_are_on_the_terminal(
    columns: int, rows: int, steps: list[list[str] | None]
) -> None:
    terminal = Terminal(columns)
    screen = Screen(terminal)  # type: ignore[arg-type]
    screen.size = lambda: (columns, rows)  # type: ignore[method-assign]
    notes, shown = 0, list[str]()
    for step in steps:
        if step is None:
            screen.clear()
            terminal.write("n\n")
            notes, shown = notes + 1, []
        else:
            before = terminal.writes
            screen.draw(step)
            assert terminal.writes == before + 1  # whole pictures only
            shown = [line[: columns - 1] for line in step[-(rows - 1) :]]
    assert terminal.lines == [*["n"] * notes, *shown, ""]
    screen.clear()
    assert terminal.lines == [*["n"] * notes, ""]


@pytest.mark.parametrize("columns", [200, 60, 20])
def test_a_terminal_shows_each_stage_and_is_left_clean(
    tmp_path: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    terminal = Terminal(columns)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Screen, "size", lambda _: (columns, 24))

    def stopped() -> None:
        with begun(tmp_path, clock) as board:
            clock.now += 10
            board.looks([replace(LOOK, done=40)])
            board.note("a note")
            shown.extend(terminal.lines)
            raise KeyboardInterrupt

    shown: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert shown[0] == "a note"
    assert [line.split()[0] for line in shown[1:-1]] == ["faces", "mel", "all"]
    assert all(len(line) < columns for line in shown)
    if columns == 200:
        bar, rest = shown[1].split("]")
        assert (bar.count("#"), bar.count(".")) == (2, 18)
        assert rest.split("  ")[-1] == "4 clips/s, ETA 1:30, 2 workers"
    assert terminal.lines == ["a note", ""]


def test_a_terminal_without_cursor_gets_lines(tmp_path: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with begun(tmp_path, clock) as board:
        clock.now += 10
        board.looks([replace(LOOK, done=40)])
    assert terminal.lines[0] == "faces: 40/400 clips, 4 clips/s, ETA 1:30, 2 workers"
