"""Training on 2 and 4 ranks ends where one process ends, in every layout; what is wrong on one rank ends all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollout.memory import needs as memory_needs
from rollout.policy import Policy
from shards.records.updates import read_updates
from shards.run import Run
from tests.support import forks, lora_forms, parallel_ranks, training
from tests.support.tiny_models import tiny_transformer
from tests.support.workers import torchrun
from train.data import Rollouts
from train.order import Unit
from train.run import train

# AdamW divides rounding noise by the gradient; the default lets it through at any size. tests/train/test_checkpoint*.py
# have the checkpoints between updates.
CALM = {"epsilon": 1e-4, "save_every": 10}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"ratio_norm": True},
    "nft": {"objective": "nft", "ema": 0.0, "max_grad_norm": 3e-3},  # every gradient is larger
    "full": {"full": True, "learning_rate": 1e-4, "updates_per_rollout": 5},  # more than there are units: two epochs
    "full-once": {"full": True, "learning_rate": 1e-4, "updates_per_rollout": 1},
    "full-nft": {"full": True, "learning_rate": 1e-4, "objective": "nft"},
    "held": {"estimator": "endpoint", "error_weight": "adaptive", "proximal": 1.0, "clip_range": 1.0},
    "dpo": {"objective": "dpo", "pair_margin": 0.0, "dpo_beta": 20.0},
    "full-sft": {"full": True, "learning_rate": 1e-4, "objective": "sft", "sft_best": 2},
    # one update: after it bfloat16 forwards round the last bits of the weights up to visible differences
    "bf16-lora": {"updates_per_rollout": 1},
    # from a LoRA with biases that somebody else has made
    "start": {"updates_per_rollout": 1},
    # the second iteration, after a first by one process
    "bf16-full-next": {"full": True, "learning_rate": 1e-4, "updates_per_rollout": 1},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora dp": (2, {}),
    "lora ulysses checkpointing": (2, {"ulysses": 2, "gradient_checkpointing": True}),
    "full dp checkpointing": (2, {"gradient_checkpointing": True}),
    "full-nft dp": (2, {}),
    "bf16-lora dp": (2, {}),
    "bf16-full-next dp": (2, {}),
    "nft dp": (2, {}),
    "held dp": (2, {}),
    "dpo dp": (2, {}),
    "full-sft dp": (2, {}),
    "start dp": (2, {}),
    "nft hsdp": (2, {"replicate": 2}),
    "lora dp ulysses": (4, {"ulysses": 2}),
    "lora hsdp checkpointing": (4, {"replicate": 2, "gradient_checkpointing": True}),
    "full-once dp ulysses": (4, {"ulysses": 2}),
    "nft dp ulysses": (4, {"ulysses": 2}),
}
# the others have all that these put together
LONG = ("full-nft dp", "held dp", "full-sft dp", *(name for name, (size, _) in LAYOUTS.items() if size == 4))
NAMES = [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in LAYOUTS]
Results = dict[str, list[dict[str, Any]]]
Found = tuple[Path, Results]


@pytest.fixture(scope="module")
def grounds(tiny_t2v2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """For each of SETTINGS a run whose last iteration is sampled and scored, and not yet trained.

    Those in bfloat16 have a LoRA beneath.
    """
    folder = tmp_path_factory.mktemp("grounds")
    lora = lora_forms.write(folder / "a.safetensors", lora_forms.native(tiny_transformer(1), 5, bias=True))
    both = {"base_lora": str(lora), "base_lora_2": str(lora)}
    models = {"float32": {}, "start": {"lora": str(lora), "lora_2": str(lora)}, "bf16": {"dtype": "bfloat16", **both}}
    runs = {}
    for kind, model in models.items():
        run = training.make_run(folder / f"of {kind}", tiny_t2v2, CALM, model=model, low_steps=1)
        policy = Policy.of(run.config.model)
        training.advise(training.roll(run, 0, policy))
        names = [
            name for name in SETTINGS if (name.split("-")[0] if name.split("-")[0] in models else "float32") == kind
        ]
        runs |= {name: training.fork(run, folder / name, **SETTINGS[name]) for name in names}
    train(runs["bf16-full-next"], 0, policy)
    training.advise(training.roll(runs["bf16-full-next"], 1, policy))
    return runs


@pytest.fixture(scope="module")
def ground(grounds: dict[str, Run]) -> Run:
    """The simplest of them."""
    return grounds["lora"]


@pytest.fixture(scope="module")
def wanted(request: pytest.FixtureRequest) -> set[str]:
    """Those of LAYOUTS that tests of this session ask for."""
    items = [item for item in request.session.items if item.path == request.path]
    return LAYOUTS.keys() & {item.callspec.params.get("name") for item in items if hasattr(item, "callspec")}


@pytest.fixture(scope="module")
def alone(grounds: dict[str, Run], wanted: set[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The last iteration trained by one process."""
    folder, names = tmp_path_factory.mktemp("alone"), {name.split()[0] for name in wanted}
    runs = {name: training.fork(grounds[name], folder / name) for name in names}
    for run in runs.values():
        train(run, run.iterations()[-1])
    return runs


@pytest.fixture(scope="module")
def on_two(grounds: dict[str, Run], wanted: set[str], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What came of every layout and mishap for 2 ranks."""
    return on_ranks(grounds, tmp_path_factory.mktemp("two"), 2, wanted)


@pytest.fixture(scope="module")
def on_four(grounds: dict[str, Run], wanted: set[str], tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What came of every layout and mishap for 4 ranks."""
    return on_ranks(grounds, tmp_path_factory.mktemp("four"), 4, wanted)


def on_ranks(grounds: dict[str, Run], folder: Path, ranks: int, wanted: set[str]) -> Found:
    """The folder of the runs, and what each rank said of each case, from one start of the ranks."""
    layouts = {name: settings for name, (size, settings) in LAYOUTS.items() if size == ranks and name in wanted}
    cases = [case_of(grounds[name.split()[0]], folder, name, **settings) for name, settings in layouts.items()]
    for case in cases[:1]:
        case["command"] = True
    return folder, start(folder / "ranks", ranks, cases + mishaps(grounds["lora"], folder, ranks))


def found_of(request: pytest.FixtureRequest, name: str) -> Found:
    """The results of a case, whatever the number of its ranks."""
    four = LAYOUTS[name][0] == 4 if name in LAYOUTS else name == "heads"
    found: Found = request.getfixturevalue("on_four" if four else "on_two")
    return found


def case_of(ground: Run, folder: Path, name: str, action: str = "train", **settings: Any) -> dict[str, Any]:
    """A run of its own to be trained on many ranks."""
    run = training.fork(ground, folder / name, **settings)
    return {"name": name, "action": action, "run": str(run.path), "iteration": run.iterations()[-1]}


def mishaps(ground: Run, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What shall end all ranks, with a sentence from the first."""
    if ranks == 4:
        return [case_of(ground, folder, "heads", ulysses=4)]
    other = training.fork(ground, folder / "elsewhere")
    return [
        case_of(ground, folder, "degree", ulysses=3),
        case_of(ground, folder, "replicas", ulysses=2, replicate=2),
        case_of(ground, folder, "odd weights", "odd weights", replicate=2),
        case_of(ground, folder, "settings") | {"sets": ["train.ulysses=2"]},
        case_of(ground, folder, "folder", "odd folder") | {"others": str(other.path)},
        case_of(ground, folder, "odd log-probs", "odd log-probs"),
        case_of(ground, folder, "odd file", "odd file"),
        case_of(ground, folder, "odd software", "odd software"),
        case_of(ground, folder, "odd advantages", "odd advantages"),
        case_of(ground, folder, "interrupted", "interrupted"),
        case_of(ground, folder, "recomputed", "recomputed", recompute_log_probs=True),
    ]


def start(folder: Path, ranks: int, cases: list[dict[str, Any]]) -> Results:
    """Run cases on that many ranks; what every rank found, by the name of the case."""
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    forks.finish(*forks.ranks(folder, *[lambda: parallel_ranks.main(folder / "cases.json")] * ranks))
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return {case["name"]: [one[case["name"]] for one in found] for case in cases}


def published(run: Path) -> dict[str, torch.Tensor]:
    """All weights the last iteration published, averages too."""
    files = [path for path in (last(run) / "policy").rglob("*.safetensors") if "trainer" not in path.parts]
    return {f"{path.relative_to(run)}/{name}": value for path in files for name, value in load_file(path).items()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics of the last iteration, but for what one process used up, and what depends on its share of a batch."""
    updates = read_updates(last(run) / "policy" / "metrics.jsonl")
    own = ("seconds", "peak_memory_bytes", "signal")
    return [{name: value for name, value in update.items() if name not in own} for update in updates]


def last(run: Path) -> Path:
    """The folder of the last iteration of a run."""
    return max(run.glob("iter-*"))


def base_weights(model: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """What the published weights of those names were before; nothing for an adapter, which begins at zero."""
    folders = {"high_noise": "transformer", "low_noise": "transformer_2"}
    files = {name: load_file(next((model / folder).glob("*.safetensors"))) for name, folder in folders.items()}
    found = {}
    for name in names:
        expert = next(part for part in name.split("/") if part in files)
        found[name] = files[expert].get(name.split("/")[-1])
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("name", NAMES)
def test_many_ranks_end_where_one_process_ends(
    name: str, request: pytest.FixtureRequest, alone: dict[str, Run], tiny_t2v2: Path
) -> None:
    folder, results = found_of(request, name)
    assert "error" not in results[name][0], results[name][0]
    ours, theirs = published(folder / name), published(alone[name.split()[0]].path)
    assert ours.keys() == theirs.keys()
    before = base_weights(tiny_t2v2, list(theirs))
    for key, value in theirs.items():
        difference = float((ours[key].float() - value.float()).abs().max())
        # an average that lies between two values of bfloat16 may be rounded to the other one
        assert difference <= (3e-5 if value.dtype == torch.float32 else 2**-7) * float(value.abs().max()), key
        if value.dtype == torch.bfloat16:
            continue
        if key in before:
            moved = float((value - before[key]).abs().max())
            assert moved > 0
            assert difference <= 2e-2 * moved, key  # the change itself, as far as fp32 beside a weight can tell it
    for mine, other in zip(metrics(folder / name), metrics(alone[name.split()[0]].path), strict=True):
        words = {key for key, value in other.items() if isinstance(value, str)}
        assert {key: mine.pop(key) for key in words} == {key: other.pop(key) for key in words}
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-9)  # a mean shift is a small difference of large numbers


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_replays_and_keeps_its_ranks_equal(name: str, request: pytest.FixtureRequest) -> None:
    found = found_of(request, name)[1][name]
    limit = 1e-6 if "ulysses" in name else 0.0
    assert all(one["replay"] <= limit for one in found)
    assert len({one["fingerprint"] for one in found}) == 1
    updates = sum(found[0]["updates"].values())
    assert all(len(one["sums"]) == updates and len(set(one["sums"])) == updates for one in found)
    assert len({tuple(one["sums"]) for one in found}) == 1
    assert {one["met"] for one in found} == {1}  # also where the command line has seen to it before


@pytest.mark.parametrize("name", ["lora dp", "nft dp", pytest.param("lora dp ulysses", marks=pytest.mark.long)])
def test_ranks_do_the_work_of_one_process_once(name: str, request: pytest.FixtureRequest, ground: Run) -> None:
    found = found_of(request, name)[1][name][:: LAYOUTS[name][1].get("ulysses", 1)]
    units = [Unit(*entry[2:5], tuple(entry[5]), entry[6]) for one in found for entry in one["used"] if entry[1]]
    assert sorted(units) == sorted(Rollouts.open(ground.iteration(0)).units())
    slots = [[entry[0] for entry in one["used"]] for one in found]
    assert all(slot == slots[0] for slot in slots)  # the same number of forwards in every update, padding included
    padded = sum(not entry[1] for one in found for entry in one["used"])
    assert padded == len(found) * len(slots[0]) - len(units)


@pytest.mark.parametrize("name", ["lora dp", "bf16-lora dp", "bf16-full-next dp"])
def test_ranks_hold_together_what_plan_memory_divides(name: str, on_two: Found, grounds: dict[str, Run]) -> None:
    planned = memory_needs.train_need(grounds[name.split()[0]], 2).parts
    for update in zip(*(one["held"] for one in on_two[1][name]), strict=True):
        # with full training the weights of the rollout lie in host memory
        parts = [part for part in update[0].keys() & planned.keys() if any(one[part] for one in update)]
        assert {part: sum(one[part] for one in update) // 2 for part in parts} == {
            part: planned[part] for part in parts
        }
        assert {*parts} >= {"weights", "gradients", "AdamW"}


MISHAPS = {
    "degree": "train.ulysses = 3: 2 ranks cannot be divided so (hint: 1, 2 would do)",
    "replicas": "train.replicate = 2: 2 ranks with train.ulysses = 2 cannot be divided so (hint: 1 would do)",
    "heads": "train.ulysses = 4: does not divide the 2 heads and 2 tokens of this model and video size "
    "(hint: 1, 2 would do with 4 ranks)",
    "settings": "rank 1 has another configuration than rank 0: train.ulysses = 2 instead of "
    "train.ulysses = 1 (hint: all ranks need the same run directory, model, settings and software)",
    "folder": "rank 1 of 2: {elsewhere} is not the run directory that rank 0 has as {folder} "
    "(hint: all ranks need the same run directory, on a file system that all machines share)",
    "odd software": "rank 1 has another software than rank 0: rushes 2.0 instead of rushes 1.0 "
    "(hint: all ranks need the same run directory, model, settings and software)",
    "odd file": "rank 1 of 2: shard-000000.tar: crc32 of the latents is wrong (hint: restore the file)",
    "odd weights": "high_noise expert, update 1: rank 1 has other weights than rank 0 (hint: a machine computes "
    "wrongly or a message was damaged; the checkpoint before this update is good)",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name == "heads")) for name in MISHAPS])
def test_what_is_wrong_on_one_rank_ends_all_with_one_sentence(name: str, request: pytest.FixtureRequest) -> None:
    folder, results = found_of(request, name)
    sentence = MISHAPS[name].format(elsewhere=folder / "elsewhere", folder=folder / "folder")
    assert [one["error"] for one in results[name]] == [sentence] * len(results[name])
    assert [one["told"] for one in results[name]] == [False] + [True] * (len(results[name]) - 1)
    assert not (folder / name / "iter-0000" / "policy" / "policy.json").exists()


def test_ranks_with_different_advantages_train_nothing(on_two: Found) -> None:
    found = on_two[1]["odd advantages"]
    name = training.SPECIFICATION
    said = rf"rank 1 has another set of advantages than rank 0: {name} \w{{64}} instead of {name} \w{{64}} \(hint"
    assert all(re.match(said, one["error"]) for one in found), found
    assert [one["told"] for one in found] == [False, True]


def test_a_rank_whose_log_probs_differ_fails_the_gate_of_all(on_two: Found) -> None:
    folder, results = on_two
    found = results["odd log-probs"]
    assert {one["kind"] for one in found} == {"RunFailed"}
    assert len({one["error"] for one in found}) == 1
    assert found[0]["error"].startswith("replay failed: |log-ratio| 0.25 is above 0 for i000000-")
    assert [one["told"] for one in found] == [False, True]
    assert not (folder / "odd log-probs" / "iter-0000" / "policy").exists()


def test_a_signal_on_one_rank_gives_all_its_exit_code(on_two: Found) -> None:
    found = on_two[1]["interrupted"]
    assert [(one["kind"], one["code"], one["told"]) for one in found] == [
        ("Stopped", 130, False),
        ("Stopped", 130, True),
    ]
    assert found[0]["error"].startswith("rank 1 of 2: stopped by SIGINT while it waited")


def test_ranks_share_the_log_probs_they_recompute(on_two: Found) -> None:
    assert [one["error"] for one in on_two[1]["recomputed"]] == ["4 of 4 units"] * 2


def rushes_on_ranks(folder: Path, *arguments: object) -> str:
    """The command line in two ranks that are there already."""
    return forks.finish(*forks.ranks(folder, *[forks.rushes(*arguments)] * 2))


@pytest.mark.parametrize("start", [rushes_on_ranks, pytest.param(torchrun, marks=pytest.mark.long)])
def test_rushes_train_on_ranks_speaks_once(start: Callable[..., str], ground: Run, tmp_path: Path) -> None:
    run = training.fork(ground, tmp_path / "run", updates_per_rollout=1)
    talk = start(tmp_path / "ranks", "train", run.path)
    assert len(re.findall(r"^iter-0000 train: 1 update of high_noise", talk, re.M)) == 1
    assert "UserWarning" not in talk
    assert run.iteration(0).trained()
