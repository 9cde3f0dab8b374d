"""Which prompts of its files a run trains on, and which it evaluates on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rollout.prompts.checks import check_readable, reads
from rollout.prompts.files import Column
from rollout.prompts.load import Prompt, load_prompts, prompts_of_iteration, split
from rollout.words.paths import words_folder
from shards.errors import UserError
from shards.store.urls import named_here
from shards.text.recognisers import FOLDERS, NETWORK

if TYPE_CHECKING:
    from shards.config import RunConfig


def training_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts that the iterations of a run share among them. Raises UserError as `load_prompts` does."""
    if config.eval.holdout:
        return _held_out(config)[0]
    return load_prompts(config.rollout.prompts, reads(config.score), Column(config.rollout.prompt_column))


def evaluation_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of every evaluation, at most `eval.limit`. Raises UserError as `load_prompts` does."""
    if config.eval.holdout:
        return _held_out(config)[1][: config.eval.limit]
    embedded = words_folder() / "prompts" / "eval.txt"
    path = embedded if config.eval.prompts == "words" else Path(config.eval.prompts)
    column = Column(config.eval.prompt_column, "eval.prompt_column")
    return load_prompts(path, reads(config.score), column)[: config.eval.limit]


def check_files(config: RunConfig) -> None:
    """Read the prompts files of a new run, but not those at URLs, nor networks of the user's for the OCR reward.

    Raises UserError for what can be told without the model: a file or a record that cannot be read, a prompt without a
    target where one is needed, a target that the OCR reward could never read, fewer prompts than an iteration takes.
    """
    if config.eval.holdout:
        _check_held_out(config)
    found: list[Prompt] = []
    if named_here(config.rollout.prompts):
        found += training_prompts(config)
        prompts_of_iteration(found, config.rollout.prompts_per_iteration, config.rollout.seed, 0)
    if named_here(config.eval.prompts):
        found += evaluation_prompts(config)
    if not {NETWORK, *FOLDERS} & config.score.options.get("ocr", {}).keys():  # files of the machine that scores
        check_readable(found, config.score)


def _check_held_out(config: RunConfig) -> None:
    """UserError where training and evaluation do not name one file of the user's, and one column, to be divided."""
    share, column = config.eval.holdout, config.rollout.prompt_column
    names, columns = (config.rollout.prompts, config.eval.prompts), (column, config.eval.prompt_column)
    if names[0] != names[1] or names[0] == "words":
        raise UserError(
            f"eval.holdout = {share:g}, but rollout.prompts is {names[0]} and eval.prompts {names[1]}",
            "it divides one file: give both that file, or leave eval.holdout at 0",
        )
    if columns[0] != columns[1]:
        raise UserError(
            f"eval.holdout = {share:g}, but rollout.prompt_column is {columns[0]} and eval.prompt_column {columns[1]}",
            "it divides one file: give both the same name",
        )


def _held_out(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """What is trained on and what is evaluated of the one prompts file."""
    _check_held_out(config)
    share, column = config.eval.holdout, config.rollout.prompt_column
    prompts = load_prompts(config.rollout.prompts, reads(config.score), Column(column))
    train, test = split(prompts, share)
    if not train or not test:
        side = "evaluation" if train else "training"
        raise UserError(f"eval.holdout = {share:g} leaves no prompt of {len(prompts)} for {side}", "change that share")
    return train, test
