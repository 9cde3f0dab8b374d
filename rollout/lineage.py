"""Which policy an iteration starts from, and whether its files are those that were committed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import ANEW, RunFailed, UserError
from shards.plan import SCHEMA
from shards.records.kinds import PolicyRecord, read_policy
from shards.records.reading import sealed
from shards.run import AVERAGE, POLICY_RECORD, Run, Stage

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.policy.experts import Identity


def policy_source(run: Run, stage: Stage) -> Path | None:
    """The policy folder a stage samples with; None for iteration 0, which has the model as [model] names it.

    An evaluation takes the averaged weights where `eval.ema` asks for them and training kept them. Raises UserError
    when the iteration before was not trained.
    """
    if stage.iteration == 0:
        return None
    before = stage.iteration - 1
    trained = run.iteration(before)
    folder = trained.policy_dir
    if not trained.trained():
        raise UserError(
            f"{trained.policy_record_path} does not exist: iteration {stage.iteration} samples with the policy that "
            f"iteration {before} trains",
            run.way_to_policy(before),
        )
    trained.fetched_policy()
    return (averaged(folder) if stage.kind == "eval" and run.config.eval.ema else None) or folder


def averaged(folder: Path) -> Path | None:
    """Folder of the averaged weights of a trained policy; None where training kept none. RunFailed: they are gone."""
    average = folder / AVERAGE
    if not average.is_dir() and read_policy(folder / POLICY_RECORD).average:
        raise RunFailed(f"{average} is missing, but {POLICY_RECORD} names it", ANEW)
    return average if average.is_dir() else None


def check_committed(source: Path, identity: Identity) -> None:
    """RunFailed unless weights, or averaged ones, have the identity that training wrote down in policy.json."""
    path = (source.parent if source.name == AVERAGE else source) / POLICY_RECORD
    if not path.is_file():
        return
    record = read_policy(path)
    known = record.average if source.name == AVERAGE else record
    if known is not None and known.fingerprint != identity["fingerprint"]:  # once averages were not named
        named, found = known.adapters, identity["adapters"]
        changed = [name for name in sorted({*named, *found}) if named.get(name) != found.get(name)]
        which = f": {', '.join(changed)}" if changed else ", or the base model is another one"
        raise RunFailed(f"{source}: its files are not those its {POLICY_RECORD} names{which}", ANEW)


def take_policy(run: Run, stage: Stage, policy: Policy) -> Identity:
    """Give the policy the weights of the stage; returns their identity, checked against what the run knows.

    Raises UserError when the base model is not the one the run began with, RunFailed when adapter files changed since
    training committed them.
    """
    _check_model(run, policy)
    source = policy_source(run, stage)
    identity = policy.experts.fingerprint(source)
    if source is not None:
        check_committed(source, identity)
    policy.experts.become(source)
    return identity


def policy_record(stage: Stage) -> PolicyRecord | None:
    """policy.json, the commit record of the policy an iteration trained; None before it is whole."""
    return read_policy(stage.policy_record_path) if stage.trained() else None


def starting_policy(run: Run, iteration: int) -> Path | None:
    """Folder of the policy an iteration starts from; None for iteration 0, which starts from the model itself.

    UserError when the iteration before was not trained to its end.
    """
    if iteration == 0:
        return None
    before = run.iteration(iteration - 1)
    if policy_record(before) is None:
        raise UserError(f"{before.policy_dir} holds no policy", f"run `{run.way_to_policy(iteration - 1)}` first")
    return before.fetched_policy()


def _check_model(run: Run, policy: Policy) -> None:
    """Write down the base model at the first stage of a run; later stages must have the same one."""
    path = run.model_path
    record = {"schema": SCHEMA, "base": policy.experts.base_fingerprint, "path": run.config.model.path}
    if policy.experts.base_lora is not None:
        record |= {"model": policy.experts.model_fingerprint, "base_lora": policy.experts.base_lora.identity()}
    run.files.publish_new(path, sealed(record, path))
    policy.check_model(path)
