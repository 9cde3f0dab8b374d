"""What `shards.open` gives: the tables and the videos of a run, to be read in a notebook. Nothing loads torch."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

from shards.inspect import query, sample, table
from shards.measures import read_metrics
from shards.notebook.player import Player
from shards.run import Run

if TYPE_CHECKING:
    import pandas

    from shards.inspect.sample import Described
    from shards.video import Frames


class RunView:
    """A run, read-only. Every call reads the files again, so a run that is at work can be followed.

    `path` is what was opened, and `run` the run directory as `shards.run.Run` describes it. A key such as
    `i000003-p000017-s05` names one sample; keys of rollouts and of evaluations look alike, so the methods that take one
    have the argument `evaluation`.
    Errors are `shards.errors.UserError`, with what to do, and `shards.errors.Damaged` for a broken file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        Run.open(path)

    def __repr__(self) -> str:
        run = self.run
        return f"<run {self.path}: {len(run.iterations())} iterations, {len(run.evaluations())} evaluations>"

    @property
    def run(self) -> Run:
        """The run directory; of a run at a URL the working copy, brought up to date."""
        return Run.open(self.path)

    def table(self, iteration: int | None = None, evaluation: bool = False) -> pandas.DataFrame:
        """Samples with their rewards and advantages: one row per sample.

        The rollouts, or with `evaluation` the evaluations; of one `iteration`, or of all. Columns: `kind`, `key`,
        `iteration`, `prompt_id`, `group`, `sample`, `prompt`, `target`, `seed`, `noise_seed`, `reward`, `advantage`,
        `weight`, `reason`, `status`; of each scorer `NAME.reward`, `NAME.<component>` and `NAME.text`; `window` and
        `log_prob` (lists, one item per stochastic step), `bytes`, `seconds`, `host`, `shard`. What does not exist yet
        is NaN.
        """
        return query.of_kind(table.samples(self.path, iteration), evaluation)

    def groups(self, iteration: int | None = None, evaluation: bool = False) -> pandas.DataFrame:
        """Groups with the spread of their rewards: one row per group.

        Columns: `kind`, `iteration`, `group`, `prompt_id`, `prompt`, `target`, `samples`, `missing` (without a
        reward), `bytes`, `used` (samples with an advantage), `reward_mean`, `reward_std` (ddof 1), `reward_min`,
        `reward_max`.
        """
        return table.groups(self.table(iteration, evaluation))

    def metrics(self) -> pandas.DataFrame:
        """Updates: one row per update of each expert, with the fields of `metrics.jsonl`.

        docs/metrics.md describes them. A field that an update does not have is NaN. Without updates the table is empty.
        """
        import pandas

        run = self.run
        stages = [run.iteration(number) for number in run.iterations()]
        return pandas.DataFrame([record for stage in stages for record in read_metrics(stage)])

    def evaluations(self) -> pandas.DataFrame:
        """Evaluated policies: one row per policy, compared with the first one prompt by prompt.

        Columns: `iteration` (iterations that the policy was trained for; 0 is the base model), `videos` (with a
        reward), `reward` and `standard_error`; `change`, the mean over prompts of what a prompt gained, with
        `change_error`, its standard error; `wins`, `losses` and `ties`, which count prompts. The last five are NaN for
        the first policy and for one whose prompts or seeds differ. Only policies that were scored by the same rewards
        as the last one are listed.
        """
        import pandas

        from shards.report.paired import evaluated, meant

        specification, stages = meant(self.run)
        compared = {"change": "difference", "change_error": "standard_error", "wins": "wins", "losses": "losses"}
        compared |= {"ties": "ties"}
        rows: list[dict[str, object]] = []
        for one in evaluated(stages, specification):
            row: dict[str, object] = {"iteration": one.iteration, "videos": one.videos}
            row |= {"reward": one.mean_reward, "standard_error": one.standard_error}
            rows.append(row | {name: getattr(one.paired, field, None) for name, field in compared.items()})
        numbers = ("reward", "standard_error", *compared)
        frame = pandas.DataFrame(rows, columns=["iteration", "videos", *numbers])
        return frame.astype(dict.fromkeys(numbers, float))

    def sample(self, key: str, evaluation: bool = False) -> Described:
        """Everything about one sample as plain values: its record, every score, the text that was read, its steps.

        The keys are `file`, `record`, `judgement`, `scores`, `text`, `steps` (one item per denoising step) and
        `latents` (dtype, shape, the states stored).
        """
        return sample.describe(self.path, key, evaluation)

    def video(self, key: str, evaluation: bool = False) -> bytes:
        """The video of a sample: the bytes of an mp4 file, as they are stored."""
        return sample.read_video(self.path, key, evaluation)

    def frames(self, key: str, evaluation: bool = False) -> Frames:
        """The frames of a sample: uint8 RGB, an array [T, H, W, 3]."""
        return sample.read_frames(self.path, key, evaluation)

    def play(self, key: str, evaluation: bool = False, width: int = 320) -> Player:
        """The video of a sample as a cell of a notebook shows it, `width` pixels wide, with its prompt and reward.

        The HTML holds the video itself, so a saved notebook plays it without the run.
        """
        found = self.sample(key, evaluation)
        reward = found["judgement"]["reward"]
        said = f"{found['record']['prompt']} · reward {'-' if reward is None else format(reward, '.3f')}"
        data = base64.b64encode(self.video(key, evaluation)).decode()
        return Player.of(data, title=html.escape(key), caption=html.escape(said), width=width)
