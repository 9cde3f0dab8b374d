"""The report: its numbers, its limits, and the page itself in a real browser."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import sidecar
from shards.diagnosis import number
from shards.errors import UserError
from shards.report import clips as report_clips
from shards.report import facts as report_facts
from shards.report import tracked_clips
from shards.report.page import write_report
from shards.report.points import Point
from shards.report.shell import security_policy
from shards.report.svg import Series, lines, nice_ticks
from shards.report.tables import duration
from shards.report.trackers import NAME, send_wandb, write_board
from shards.run import Run, Stage
from shards.video import encode_mp4
from tests.support import chromium
from tests.support.shard_fixtures import advantage_frame, committed_stage, score_frame, write_train_plan

HOSTILE = '</script><script>alert("x")</script> "FILM" & ${name}'
CLIPS = (
    2 * 2 * 2 + 2 * 2 * 3
)  # evaluations: policies x prompts x seeds; groups: iterations x groups x best, median, worst


def make_run(
    path: Path, *, first: int = 0, iterations: int = 2, dark_after: float = 0.2, text: str = '["<FILM>", ""]'
) -> Run:
    """Iterations of two groups, each with an evaluation; luma moves to `dark_after`, saturation stays."""
    for k in range(first, iterations):
        judge(committed_stage(path, k, group_size=4, prompt=HOSTILE), 0.2 if k == 0 else dark_after, text)
        judge(committed_stage(path, k, evaluation=True, group_size=2, prompt=HOSTILE), 0.2, text)
        write_updates(Run(path).iteration(k))
    (path / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    return Run.open(path)


def judge(stage: Stage, luma: float | tuple[float, ...], text: str = "[]") -> None:
    """Scores of a reward that reads, guards and advantages for a whole stage; `luma` for all shards, or of each."""
    for shard in stage.shards():
        level = luma if isinstance(luma, float) else luma[shard]
        scores = score_frame(stage, shard)
        cost = {"seconds": "1.25", "peak_memory_bytes": str(3 * 2**30)}
        sidecar.write_scores(stage, shard, "ocr-1a2b3c4d", scores.assign(text=text), cost)
        guards = scores.drop(columns=["accuracy", "text"])
        noise = 0.001 * np.arange(len(guards))
        sidecar.write_scores(
            stage, shard, "guards-1a2b3c4d", guards.assign(reward=level, luma=level + noise, saturation=0.5), {}
        )
        sidecar.write_advantages(stage, shard, "0123abcd", advantage_frame(stage, shard), {})


def write_updates(stage: Stage, **changed: float) -> None:
    """metrics.jsonl with two updates of each expert; the last line cut off, as a kill leaves it."""
    values = {
        "ratio_mean": 1.0,
        "ratio_min": 1.0,
        "ratio_max": 1.0,
        "kl": 0.1,
        "clip_fraction": 0.0,
        "gradient_norm": 0.5,
    }
    records = [
        {"iteration": stage.iteration, "expert": expert, "update": update, "total_updates": update}
        | {"seconds": 1.5, "peak_memory_bytes": 2.0**31}
        | values
        | changed
        for expert in ("high_noise", "low_noise")
        for update in (1, 2)
    ]
    stage.policy_dir.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(record) for record in records) + '\n{"iterat'
    (stage.policy_dir / "metrics.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("report") / "signs")


class Reader(HTMLParser):
    """Counts tags, and collects everything a page could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "poster", "srcset", "data")]


# --- The file --------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(run: Run) -> None:
    path = write_report(run)
    assert path == run.path / "report" / "index.html"
    assert [entry.name for entry in path.parent.iterdir()] == ["index.html"]
    found = Reader(path.read_text(encoding="utf-8"))
    assert found.tags["video"] == CLIPS
    assert all(source.startswith(("data:", "#")) for source in found.sources)
    assert not re.search(r"@import|url\(", path.read_text(encoding="utf-8"))


def test_prompts_and_readings_are_text_and_nothing_else(run: Run) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    assert Reader(text).tags["script"] == 1
    assert "&lt;/script&gt;&lt;script&gt;alert(" in text
    assert "&amp; ${name}" in text
    assert "&lt;FILM&gt; · ∅" in text


def test_the_same_files_give_the_same_page(run: Run) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_clips_that_do_not_fit_are_counted_and_never_halves_of_a_comparison(run: Run) -> None:
    whole = write_report(run).stat().st_size
    text = write_report(run, megabytes=0.02).read_text(encoding="utf-8")
    shown = Reader(text).tags.get("video", 0)
    assert 0 < shown < CLIPS
    assert f"{CLIPS - shown} clips were left out" in text
    assert len(text) < whole
    none = write_report(run, megabytes=0).read_text(encoding="utf-8")
    assert Reader(none).tags.get("video", 0) == 0
    assert f"{CLIPS} clips were left out" in none
    for row in re.findall(r"<tr>.*?</tr>", text):
        assert row.count("<video") in (0, 2)
    with pytest.raises(UserError, match="limit"):
        write_report(run, megabytes=-1)


def test_a_run_without_scores_or_training_has_a_page_too(tmp_path: Path) -> None:
    committed_stage(tmp_path / "run")
    (tmp_path / "run" / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    text = write_report(Run.open(tmp_path / "run")).read_text(encoding="utf-8")
    assert "No scored group to show" in text
    assert "no advantages yet" in text


def test_a_run_without_shards_has_none(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    with pytest.raises(UserError, match="holds no shard"):
        write_report(Run.open(tmp_path))


# --- The numbers -----------------------------------------------------------------------------------------------------


def test_rewards_come_with_their_spread(run: Run) -> None:
    facts = report_facts.gather(run)
    point = report_facts.middle_points(facts.of("rollout"), "reward")[1]
    assert (point.x, point.y) == (1.0, pytest.approx(0.15))
    assert (point.low, point.high) == (pytest.approx(0.0), pytest.approx(0.3))
    held_out = report_facts.error_points(facts.of("eval"), "reward")[0]
    error = float(np.std([0.0, 0.1, 0.0, 0.1], ddof=1) / 2)
    assert (held_out.low, held_out.high) == (pytest.approx(0.05 - error), pytest.approx(0.05 + error))
    assert [p.y for p in report_facts.used_points(facts.of("rollout"))] == [1.0, 1.0]
    assert report_facts.spread_points(facts.of("rollout"))[0].y == pytest.approx(np.std([0.0, 0.1, 0.2, 0.3]))


def test_updates_lie_between_their_iteration_and_the_next(run: Run) -> None:
    updates = report_facts.gather(run).updates
    assert len(updates) == 8  # the line that was cut off is none
    points = report_facts.update_points(updates, "low_noise", "ratio_mean", 1.0)
    assert [(p.x, p.y, p.low, p.high) for p in points] == [(x, 0.0, 0.0, 0.0) for x in (0.0, 0.5, 1.0, 1.5)]


def test_costs_come_from_the_records(run: Run) -> None:
    costs = {(cost.stage, cost.work): cost for cost in report_facts.gather(run).costs}
    assert costs["iter-0000", "rollout"].videos == 8
    assert costs["iter-0000", "rollout"].seconds == pytest.approx(4.0)
    assert costs["iter-0001", "train"].seconds == pytest.approx(6.0)
    assert costs["eval/iter-0001", "eval"].videos == 4
    assert costs["iter-0000", "rollout"].peak_bytes is None
    scoring = costs["iter-0001", "score ocr"]
    assert (scoring.videos, scoring.seconds, scoring.peak_bytes) == (8, pytest.approx(2.5), 3 * 2**30)
    assert costs["iter-0000", "score guards"].seconds is None  # of tables that do not say
    assert costs["iter-0000", "train"].peak_bytes == 2**31
    page = write_report(run).read_text(encoding="utf-8")
    assert "<td>score ocr</td><td>8</td><td>2.5 s</td>" in page
    assert "<td>3 GiB</td>" in page


def guard_table(values: list[list[float]]) -> pandas.DataFrame:
    """Means of groups, one list an iteration, as a table of samples."""
    rows = [
        {"kind": "rollout", "iteration": k, "group": f"g{k}{n}", "guards.luma": value}
        for k, groups in enumerate(values)
        for n, value in enumerate(groups)
    ]
    return pandas.DataFrame(rows)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.5, 0.5], [0.59, 0.59]], []),
        ([[0.5, 0.5], [0.61, 0.61]], [True]),
        ([[0.5, 0.5], [0.39, 0.39]], [True]),
        ([[0.2, 0.8], [0.3, 0.95]], [False]),  # + 25 %, but prompts differ by more
        ([[0.5], [0.61]], [True]),
        ([[0.0, 0.0], [0.1, 0.1]], [True]),
    ],
)
def test_a_guard_rings_when_it_moves_more_than_a_fifth(values: list[list[float]], expected: list[bool]) -> None:
    assert [move.alarm for move in report_facts.guard_moves(guard_table(values))] == expected


def test_alarms_say_what_moved(tmp_path: Path) -> None:
    changed = make_run(tmp_path / "dark", dark_after=0.1)
    write_updates(changed.iteration(1), ratio_max=1.5)
    found = report_facts.alarms(report_facts.gather(changed))
    assert any(sentence.startswith("Guard: luma moved −50%") for sentence in found)
    assert any("ratio 0.5 away from 1" in sentence for sentence in found)
    assert not any("saturation" in sentence for sentence in found)
    assert "3 to look at" in write_report(changed).read_text(encoding="utf-8")


def test_an_iteration_is_judged_by_the_settings_it_was_trained_with(tmp_path: Path) -> None:
    """What run.toml says today is of the next iteration: an edit must not ring for what is trained, nor silence it."""
    run = make_run(tmp_path / "signs")
    write_updates(run.iteration(0), ratio_max=1 + 5e-5)
    write_updates(run.iteration(1), ratio_max=1 + 5e-4)
    for k, frozen in enumerate(({"clip_range": 1e-3}, {"clip_range": 1e-3, "of_a_later_version": 1})):
        run.iteration(k).train_dir.mkdir()
        write_train_plan(run.iteration(k), train=frozen)

    def told(clip_range: float) -> list[str]:
        text = f'schema = 1\npreset = "words"\n[train]\nclip_range = {clip_range}\n'
        run.config_path.write_text(text, encoding="utf-8")
        return [one for one in report_facts.alarms(report_facts.gather(Run.open(run.path))) if "first update" in one]

    assert told(1e-3) == told(1e-4) == told(1.0)
    assert {sentence.partition(",")[0] for sentence in told(1e-4)} == {"Iteration 1"}


def test_a_damaged_record_of_the_settings_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs", iterations=1)
    path = run.iteration(0).train_plan_path
    path.parent.mkdir()
    write_train_plan(run.iteration(0), train={"clip_range": "wide"})
    wide = path.read_text(encoding="utf-8")
    for text, words in ((wide.replace('"train"', '"trained"'), "it has no train"), (wide, "clip_range")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words) as caught:
            report_facts.gather(run)
        assert str(path) in caught.value.problem


def test_best_median_and_worst_of_a_group() -> None:
    def roles(rewards: list[float]) -> dict[str, Any]:
        frame = pandas.DataFrame({"reward": rewards, "sample": range(len(rewards)), "iteration": 0})
        return {row["role"]: row["sample"] for row in report_clips.extremes(frame)}

    assert roles([0.1, 0.9, 0.5, 0.4, 0.7]) == {"best": 1, "median": 2, "worst": 0}
    assert roles([0.1, math.nan, 0.5]) == {"best": 2, "worst": 0}
    assert roles([0.3, math.nan]) == {"best": 0}
    assert roles([math.nan]) == {}


def test_an_advantage_that_is_0_but_for_rounding_is_written_as_0() -> None:
    row = {"key": "i000000-p000000-s00", "kind": "rollout", "reward": 0.5, "advantage": -1.9e-16}
    assert ">A 0<" in report_clips.clip(row, b"")


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8))
def test_ticks_enclose_their_values_and_are_few(values: list[float]) -> None:
    ticks = nice_ticks(values)
    room = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] - room <= min(values)
    assert ticks[-1] + room >= max(values)
    assert 2 <= len(ticks) <= 8


def test_charts_leave_out_what_is_no_number() -> None:
    points = [Point(0, 1.0), Point(1, math.nan), Point(2, 3.0, 2.0, 4.0)]
    chart = lines([Series("reward", "train", points)], label="<reward>")
    assert chart.count('class="dot') == 2
    assert "nan" not in chart
    assert "&lt;reward&gt;" in chart
    assert "nothing to show" in lines([Series("reward", "train", [])], label="reward")


def test_numbers_are_written_for_people() -> None:
    assert [number(x) for x in (0.0, 0.123456, -2.0, 1.5e-7, 123456.0, math.nan)] == [
        "0", "0.123", "−2", "1.5e−7", "1.23e5", "–",
    ]  # fmt: skip
    assert [duration(x) for x in (None, 4.21, 200.0, 18720.0)] == ["–", "4.21 s", "3 min 20 s", "5 h 12 min"]


def test_tensorboard_reads_the_rewards(run: Run) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    folder = write_board(run)
    found = {}
    for event in EventFileLoader(str(folder / NAME)).Load():
        for value in event.summary.value:
            if value.tensor.float_val:
                found[value.tag, event.step] = value.tensor.float_val[0]
    assert found["training/reward", 1] == pytest.approx(0.15)
    assert found["held out/ocr/accuracy", 0] == pytest.approx(0.05)
    assert ("training/guards/luma", 0) in found
    assert write_board(run) == folder


def test_tensorboard_shows_the_best_the_worst_and_the_same_held_out_clips(run: Run) -> None:
    import io

    from PIL import Image
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(str(write_board(run)), {event_accumulator.IMAGES: 0}).Reload()
    tags = ["held out/0 clip", "held out/1 clip", "training/best clip", "training/worst clip"]
    assert sorted(accumulator.Tags()["images"]) == tags
    for tag in tags:
        shown = accumulator.Images(tag)
        assert [event.step for event in shown] == [0, 1]
        picture = Image.open(io.BytesIO(shown[0].encoded_image_string))
        assert (shown[0].width, shown[0].height, picture.size) == (64, 32, (64, 32))
        assert (picture.n_frames, picture.info["duration"], picture.info["loop"]) == (5, 60, 0)  # GIF counts 10 ms
    rewards = {clip.tag: clip.caption for clip in tracked_clips.clips(report_facts.gather(run))}
    assert "reward 0.300" in rewards["training/best"]
    assert "reward 0.000" in rewards["training/worst"]


def test_a_large_clip_becomes_a_smaller_sparser_picture() -> None:
    frames = np.zeros((81, 96, 640, 3), np.uint8)
    data, width, height = tracked_clips.gif(
        encode_mp4(frames + np.arange(81, dtype=np.uint8)[:, None, None, None], 16), 16
    )
    assert (width, height) == (320, 48)
    assert data.startswith(b"GIF89a")


def test_weights_and_biases_gets_the_same_curves_and_clips(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "takes-of-june")
    files = Path(send_wandb(run))
    [log] = files.parent.glob("*.wandb")
    names = (b"training/reward", b"held out/ocr/accuracy", b"training/best clip", b"reward 0.300", b"takes-of-june")
    deadline = time.monotonic() + 120  # a process of the package writes it, at times after the run has ended
    # records one after another, texts as they are
    while missing := [name for name in names if name not in log.read_bytes()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.1)
    assert len(list(files.glob("media/videos/**/*.mp4"))) == 2 * len(("best", "worst", "held out 0", "held out 1"))


def test_what_weights_and_biases_refuses_is_one_sentence(run: Run, tmp_path: Path) -> None:
    """In a process of its own: the package remembers how it was used before."""
    pytest.importorskip("wandb")
    code = "import sys, cli\nsys.argv[0] = 'rushes'\ncli.main()\n"
    strange = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_MODE": "online", "WANDB_SILENT": "true"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | strange
    command = [sys.executable, "-c", code, "report", str(run.path), "--wandb"]
    root = Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("rushes: Weights & Biases: No API key")
    assert last.endswith("(hint: WANDB_MODE=offline keeps it all on this machine)")
    assert "Traceback" not in ended.stderr


def test_without_the_package_nothing_is_sent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed"):
        send_wandb(run)


def test_control_characters_and_marks_of_direction_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs", iterations=1, text='["\\u001b[31mred\\u0007", "\\u202eDER"]')
    text = write_report(run).read_text(encoding="utf-8")
    assert "\\x1b[31mred\\x07 · \\u202eDER" in text
    assert not set(text) & set("\x1b\x07\u202e")


def test_an_unsure_move_is_not_green(tmp_path: Path) -> None:
    """A guard moved by a fifth, in groups that differ by more: no alarm, and nothing to be calm about."""
    run = make_run(tmp_path / "signs")
    assert 'class="alarms quiet"' in write_report(run).read_text(encoding="utf-8")
    for k, levels in enumerate(((0.2, 0.8), (0.3, 0.95))):
        judge(run.iteration(k), levels)
    text = write_report(run).read_text(encoding="utf-8")
    assert 'class="alarms unsure"><b>No alarm, but 1 guard moved.' in text
    assert 'class="alarms quiet"' not in text
    for path in run.path.rglob("guards-*"):
        shutil.rmtree(path)
    assert "<b>No alarm, but no guards either.</b>" in write_report(run).read_text(encoding="utf-8")


def test_the_settings_of_the_iterations_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs")
    for k, (objective, rate) in enumerate((("nft", 1e-3), ("grpo", 2e-3))):
        run.iteration(k).train_dir.mkdir()
        frozen = {"objective": objective, "learning_rate": rate, "clip_range": 1e-3}
        write_train_plan(run.iteration(k), train=frozen)
    run.config_path.write_text('schema = 1\npreset = "words"\n[train]\nlearning_rate = 2e-3\n', encoding="utf-8")
    text = write_report(Run.open(run.path)).read_text(encoding="utf-8")
    assert "NFT → GRPO" in text
    assert "<h3>loss, nft</h3>" in text  # each objective's charts, whatever run.toml says now
    assert "<h3>ratio − 1, grpo</h3>" in text
    row = re.search(r'<tr><th scope="row">train.learning_rate</th><td>(.*?)</td></tr>', text)
    assert row
    assert re.sub("<.*?>", "", row[1]) == "0.001 from iteration 0; 0.002 from iteration 1"
    assert re.search(r'<tr class="other"><th scope="row">train.learning_rate</th><td>0.002</td>', text)


def test_rewards_lie_at_what_was_spent_before(run: Run) -> None:
    places = report_facts.gather(run).places
    assert places["videos"] == {0: 0, 1: 8, 2: 16}
    assert places["updates"] == {0: 0, 1: 4, 2: 8}
    assert places["hours"] == {0: 0}  # no policy has been published


def test_hours_are_left_out_of_a_copy_that_has_times_of_its_own(run: Run) -> None:
    begin = run.iteration(0).plan_path.stat().st_mtime
    for hours, shown in (((1, 2), {0: 0, 1: 1, 2: 2}), ((2, 1), {})):
        for k in (0, 1):
            record = run.iteration(k).policy_record_path
            record.parent.mkdir(exist_ok=True)
            record.write_text("{}", encoding="utf-8")
            os.utime(record, (begin + 3600 * hours[k],) * 2)
        assert report_facts.gather(run).places["hours"] == shown


def test_evaluations_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "signs")
    for k in (0, 1):
        stage = run.evaluation(k)
        for shard in stage.shards():
            frame = advantage_frame(stage, shard)
            sidecar.write_advantages(stage, shard, "0123abcd", frame.assign(reward=frame["reward"] + k / 10), {})
        summary = {"mean_reward": 0.05 + k / 10, "std_reward": 0.05, "samples": 4, "groups": 2, "used_groups": 2}
        summary |= {"schema": 1, "specification": {}}
        stage.summary_path("0123abcd").write_text(json.dumps(summary), encoding="utf-8")
    text = write_report(run).read_text(encoding="utf-8")
    [row] = re.findall(r"<tr><td>1</td>(.*?)</tr>", text)
    assert re.findall("<td>(.*?)</td>", row)[0:1] + re.findall("<td>(.*?)</td>", row)[3:] == [
        "4", "+0.1000", "0", "2", "0", "0",
    ]  # fmt: skip


# --- In a browser ----------------------------------------------------------------------------------------------------

PLAY = """
const done = arguments[arguments.length - 1];
document.querySelectorAll("details").forEach((d) => { d.open = true; });
const clips = [...document.querySelectorAll("video")];
const one = (v) => new Promise((end) => {
  if (v.error) return end("error " + v.error.message);
  v.addEventListener("error", () => end("error " + v.error.message));
  // a busy machine decodes late: a clip may have moved on before it has all its frames
  const look = () => { if (v.currentTime > 0 && v.readyState === 4) end("plays 4"); };
  ["timeupdate", "canplaythrough", "ended"].forEach((name) => v.addEventListener(name, look));
  setTimeout(() => end("stuck " + v.readyState), 50000);
  v.preload = "auto";
  v.play().catch((e) => end("refused " + e.message));
});
Promise.all(clips.map(one)).then(done);
"""
FAINT = """
const back = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!c.endsWith(", 0)")) return c; } };
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const found = [];
for (const e of document.querySelectorAll("h1, h2, h3, h4, p, td, th, li, a, span, figcaption, svg text")) {
  if (!e.textContent.trim()) continue;
  const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
  const [a, b] = [light(ink), light(back(e))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) found.push(e.className + " " + e.textContent.slice(0, 30));
}
return found;
"""


@pytest.fixture(scope="module")
def tab() -> Any:
    if not chromium.BROWSER or not chromium.DRIVER:
        pytest.skip(chromium.MISSING)
    with chromium.browser() as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_and_plays_every_clip(run: Run, tab: Any, scheme: str) -> None:
    tab.open(write_report(run), scheme)
    assert tab.wait(PLAY) == ["plays 4"] * CLIPS
    assert tab.console() == []
    assert tab.run("return document.title") == "signs · rushes report"
    assert (
        tab.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0
    )
    ink, paper = tab.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (ink, paper)]
    assert dark == [scheme == "light", scheme == "dark"]
    assert tab.run(FAINT) == []
    assert tab.run("return document.documentElement.scrollWidth <= window.innerWidth")
    shown = "[...document.querySelectorAll('svg')].filter(s => getComputedStyle(s).display !== 'none')"
    sizes = tab.run(f"return {shown}.map(s => s.getBoundingClientRect().height)")
    assert len(sizes) > 10
    assert min(sizes) > 100


NARROW = """
const small = [];
for (const e of document.querySelectorAll("svg text")) {
  const box = e.ownerSVGElement.getBoundingClientRect();
  if (!box.width) continue;
  const size = parseFloat(getComputedStyle(e).fontSize) * box.width / e.ownerSVGElement.viewBox.baseVal.width;
  if (size < 9) small.push(e.textContent);
}
const cut = [...document.querySelectorAll("nav a")].filter((e) => e.getBoundingClientRect().right > innerWidth);
return [document.documentElement.scrollWidth, innerWidth, small, cut.map((e) => e.textContent)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_can_read_it(run: Run, tab: Any, scheme: str) -> None:
    tab.command("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    try:
        tab.open(write_report(run), scheme)
        width, window, small, cut = tab.run(NARROW)
        assert (width, window) == (420, 420)
        assert small == cut == []
        assert tab.run(FAINT) == []
    finally:
        tab.command("Emulation.clearDeviceMetricsOverride")


def test_code_that_slips_into_the_page_does_not_run(run: Run, tab: Any, tmp_path: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    slipped = tmp_path / "slipped.html"
    slipped.write_text(text.replace("</main>", "<script>window.slipped = 1;</script></main>"), encoding="utf-8")
    tab.open(slipped)
    assert tab.run("return window.slipped") is None
    assert any("Content Security Policy" in message for message in tab.console())


def test_a_point_shows_its_value_under_the_pointer(run: Run, tab: Any) -> None:
    tab.open(write_report(run))
    show = "document.querySelector('#reward .hit').dispatchEvent(new PointerEvent('pointermove', {bubbles: true}));"
    assert "iteration 0: 0.15, 0 to 0.3" in tab.run(show + "return document.getElementById('tip').textContent")


def test_the_browser_test_can_fail(run: Run, tab: Any, tmp_path: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.S)[1] for tag in ("style", "script"))
    text = text.replace(security_policy(style, script, live=False), "default-src data: 'unsafe-inline'")
    broken.write_text(text.replace('"use strict";', "missing();").replace("AAAA", "BBBB"), encoding="utf-8")
    tab.open(broken)
    assert any("missing is not defined" in message for message in tab.console())
    assert any(state.startswith(("error", "refused", "stuck")) for state in tab.wait(PLAY))
