"""Mutations of advantages, objectives, the trainer and the gate."""

from __future__ import annotations

from tests.mutants.mutation import mutations

ADVANTAGE = "tests/score/test_advantages.py"
TERM = "tests/train/test_objectives.py"
ESTIMATOR = "tests/train/test_estimators.py"
OBJECTIVE = "tests/train/test_train_objectives.py"
TRAIN = "tests/train/test_train.py"
GRADIENTS = f"{OBJECTIVE}::test_losses_and_gradients_of_estimators_are_those_of_the_formulas"
PAIRS = f"{OBJECTIVE}::test_dpo_gives_the_gradient_of_its_pairs_across_batches"
PARTS = f"{TRAIN}::test_the_loss_is_the_sum_of_its_parts"
AVERAGE = f"{TRAIN}::test_averaged_weights_are_the_mean_of_the_path"
RATES = "tests/train/test_rates.py"
BROKEN = (
    "tests/format/test_broken_samples.py"
    "::test_a_sample_that_is_not_finite_is_missing_and_the_others_are_trained_on[flow-sde-1-grpo]"
)
REPLAY = "tests/train/test_replay.py"
ORDER = "tests/train/test_order.py tests/train/test_parallel_plan.py"

ADVANTAGES = mutations("score/advantages.py", ADVANTAGE, [
    ("the mean not taken out", "(values[kept] - mean[groups][kept]) / divisor[kept]", "values[kept] / divisor[kept]"),
    ("not divided by the deviation", "(values[kept] - mean[groups][kept]) / divisor[kept]",
     "(values[kept] - mean[groups][kept])"),
    ("the sign", "(values[kept] - mean[groups][kept]) / divisor[kept]",
     "(mean[groups][kept] - values[kept]) / divisor[kept]"),
    ("the variance for the deviation",
     "deviation = np.sqrt(np.bincount(groups[present], weights=squares, minlength=count) / members)",
     "deviation = np.bincount(groups[present], weights=squares, minlength=count) / members"),
    ("ddof 1", "weights=squares, minlength=count) / members)",
     "weights=squares, minlength=count) / np.maximum(members - 1, 1))"),
    ("equal values keep a spread", "deviation[~(high > low)] = 0.0", "pass"),
    ("groups below the limit kept", "(deviation > 0) & (deviation >= specification.min_spread)", "(deviation > 0)"),
    ("the limit itself dropped", "(deviation >= specification.min_spread)", "(deviation > specification.min_spread)"),
    ("global as the largest group", "np.full(len(values), values[present].std())",
     "np.full(len(values), deviation.max())"),
    ("the smallest group for the largest", "divisor = np.full(len(values), deviation.max())",
     "divisor = np.full(len(values), deviation.min())"),
    ("a missing reward trained on", "reason = np.where(~present, MISSING, np.where(~has_spread",
     'reason = np.where(~present, "", np.where(~has_spread'),
    ("a missing reward in the mean",
     "    mean = np.bincount(groups[present], weights=values[present], minlength=count) / members",
     "    mean = np.bincount(groups, weights=np.nan_to_num(values), minlength=count) / "
     "np.maximum(np.bincount(groups), 1)"),
    ("the weights of rewards ignored", "advantage += weight * normalised", "advantage += normalised"),
    ("the weights ignored in the sum", "total = sum((weight * columns[name] for", "total = sum((columns[name] for"),
    ("sum-first as normalise-first", 'if specification.combine == "sum-first":', "if False:"),
    ("a group with any spread loses it", "has_spread |= kept", "has_spread = kept"),
    ("the whole group instead of its best and worst", "members if len(members) <= best_of_n else",
     "members if True else"),
    ("twice the best", "np.concatenate((members[:half], members[-half:]))",
     "np.concatenate((members[-half:], members[-half:]))"),
    ("the order of rows", 'frame = rewards.sort_values("key", kind="stable")', "frame = rewards"),
    ("all prompts in one group", 'groups = _codes(frame["group"])', 'groups = _codes(frame["group"]) * 0'),
])  # fmt: skip

TERMS = mutations("train/objectives/losses.py", TERM, [
    ("the sign of the surrogate", "    unclipped = -advantage * ratio\n", "    unclipped = advantage * ratio\n"),
    ("the better of both for the worse", "return PolicyLoss(torch.maximum(unclipped, clipped), ratio",
     "return PolicyLoss(torch.minimum(unclipped, clipped), ratio"),
    ("clipped from below only", "ratio.clamp(1.0 - clip_range, 1.0 + clip_range)",
     "ratio.clamp_min(1.0 - clip_range)"),
    ("clipped from above only", "ratio.clamp(1.0 - clip_range, 1.0 + clip_range)",
     "ratio.clamp_max(1.0 + clip_range)"),
    ("the log-ratio for the ratio", "ratio = log_ratio.exp()", "ratio = 1.0 + log_ratio"),
    ("the ratio upside down", "ratio = log_ratio.exp()", "ratio = (-log_ratio).exp()"),
    ("the clipped told wrongly", "ratio.detach(), (clipped > unclipped)", "ratio.detach(), (clipped < unclipped)"),
    ("the hold without its half", "torch.maximum(unclipped, clipped) + 0.5 * proximal * square",
     "torch.maximum(unclipped, clipped) + proximal * square", ESTIMATOR),
    ("the hold pushes away", "clipped) + 0.5 * proximal * square", "clipped) - 0.5 * proximal * square", ESTIMATOR),
    ("the sign of the pull", "    unclipped = -advantage * pull\n", "    unclipped = advantage * pull\n", ESTIMATOR),
    ("the pull clipped on one side", "pull.clamp(-clip_range, clip_range)", "pull.clamp_max(clip_range)", ESTIMATOR),
    ("the ratio of a held loss without the square", "(pull - 0.5 * square).exp().detach()", "pull.exp().detach()",
     ESTIMATOR),
    ("advantages limited on one side", "return advantage.clamp(-limit, limit)", "return advantage.clamp_max(limit)"),
    ("the shift without its root", "_mean_square(mean - old_mean, mask).sqrt() / std",
     "_mean_square(mean - old_mean, mask) / std", TERM),
    ("the shift not in deviations", "_mean_square(mean - old_mean, mask).sqrt() / std",
     "_mean_square(mean - old_mean, mask).sqrt()", TERM),
    ("RatioNorm not times std", "/ (2.0 * std**2)) * std", "/ (2.0 * std**2))"),
    ("RatioNorm takes the shift the other way", "(log_ratio + _mean_square", "(log_ratio - _mean_square"),
    ("RatioNorm without the half", "/ (2.0 * std**2)) * std", "/ (std**2)) * std"),
    ("the KL of a step without its half", "_mean_square(mean - reference_mean.detach(), mask) / (2.0 * std**2)",
     "_mean_square(mean - reference_mean.detach(), mask) / (std**2)"),
    ("the KL of a step with std not squared", "reference_mean.detach(), mask) / (2.0 * std**2)",
     "reference_mean.detach(), mask) / (2.0 * std)"),
    ("the kinds of KL swapped", 'if kind == "velocity":', 'if kind != "velocity":'),
    ("a gradient into the reference", "_mean_square(velocity - reference_velocity.detach(), mask)",
     "_mean_square(velocity - reference_velocity, mask)"),
    ("steps weighed by the gradient", "1.0 / scale for step, scale", "scale for step, scale"),
    ("weights of steps with a mean other than 1", "value * len(raw) / total for", "value / total for"),
    ("std for the inverse gradient", 'dict(stds) if kind == "std" else', 'dict(stds) if kind != "std" else'),
    ("optimality without its half", "clamp(-1.0, 1.0) / 2.0 + 0.5", "clamp(-1.0, 1.0) + 0.5"),
    ("optimality not limited", "(advantage / limit).clamp(-1.0, 1.0) / 2.0", "(advantage / limit) / 2.0"),
    ("the good policy not mixed with the old", "beta * velocity + (1.0 - beta) * old", "beta * velocity + old"),
    ("the bad policy on the good side", "((1.0 + beta) * old - beta * velocity)",
     "((1.0 - beta) * old + beta * velocity)"),
    ("good and bad swapped", "(optimality * good + (1.0 - optimality) * bad)",
     "(optimality * bad + (1.0 - optimality) * good)"),
    ("NFT not divided by beta", "(1.0 - optimality) * bad) / beta", "(1.0 - optimality) * bad)"),
    ("NFT predicts the noise's side", "good = _adaptive_error(x - sigma *", "good = _adaptive_error(x + sigma *"),
    ("the pairs the other way round", "inside = -0.5 * beta * (gain[winners] - gain[losers])",
     "inside = -0.5 * beta * (gain[losers] - gain[winners])", PAIRS),
    ("DPO without its half", "inside = -0.5 * beta *", "inside = -1.0 * beta *", PAIRS),
    ("the push of the sure pairs", "torch.sigmoid(-inside)", "torch.sigmoid(inside)", PAIRS),
    ("losers pushed closer", "both(push, -push)", "both(push, push)", PAIRS),
    ("a tie counts as right", "right = 0.5 + 0.5 * inside.sign()", "right = (inside >= 0).float()", TERM),
    ("losers win too", "both(one, 0.0 * one)", "both(one, one)", TERM),
    ("an error over its mean square", "difference.detach().abs(), mask)", "difference.detach().square(), mask)"),
    ("squares not squared", "average(difference.float().square(), mask)", "average(difference.float().abs(), mask)"),
])  # fmt: skip

ESTIMATORS = mutations("train/objectives/estimators.py", ESTIMATOR, [
    ("the pull away from the target", "target.detach().float() - old\n", "old - target.detach().float()\n"),
    ("the pull without the weight", "weight * average(moved * wanted, mask)", "average(moved * wanted, mask)"),
    ("the square without the weight", "weight * average(moved.square(), mask)", "average(moved.square(), mask)"),
    ("the adaptive weight with sigma squared", "return sigma / error.clamp_min(1e-5)",
     "return sigma**2 / error.clamp_min(1e-5)", f"{ESTIMATOR} {GRADIENTS}"),
    ("the weight of a step not squared", "weight = (step_slope(schedule, step) / std) ** 2",
     "weight = abs(step_slope(schedule, step) / std)"),
    ("calibrated as derived", 'weight * gaussian_factor(schedule, step, window) if kind == "calibrated"',
     'weight if kind == "calibrated"'),
    ("the factor upside down", "return after * stds[step] ** 2 / (kappa * residual)",
     "return kappa * residual / (after * stds[step] ** 2)"),
    ("std of the factor not squared", "return after * stds[step] ** 2 /", "return after * stds[step] /"),
    ("the gains of all steps, not of those after", "for gain in gains[step + 1 :]:", "for gain in gains[step:]:"),
    ("the sign of the velocity that fits", "slope = (2.0 * sigma - 1.0)", "slope = (1.0 - 2.0 * sigma)"),
    ("steps outside the window with noise", "if not stochastic:", "if stochastic:"),
])  # fmt: skip

SELECTION = mutations("train/objectives/selection.py", OBJECTIVE, [
    ("the worst for the best", "sorted(keys, key=lambda key: -advantages[key][0])",
     "sorted(keys, key=lambda key: advantages[key][0])",
     f"{OBJECTIVE}::test_pairs_of_a_group {OBJECTIVE}::test_the_best_of_a_group"),
    ("one more than the best", "for key in ranked[: config.sft_best]:", "for key in ranked[: config.sft_best + 1]:",
     f"{OBJECTIVE}::test_the_best_of_a_group"),
    ("the second worst for the worst", "[(ranked[0], ranked[-1])]", "[(ranked[0], ranked[-2])]",
     f"{OBJECTIVE}::test_pairs_of_a_group"),
    ("the margin the other way", ">= max(config.pair_margin, 1e-9)", "<= max(config.pair_margin, 1e-9)",
     f"{OBJECTIVE}::test_pairs_of_a_group"),
    ("winner and loser swapped", "(sample_of(winner), sample_of(loser))", "(sample_of(loser), sample_of(winner))",
     f"{OBJECTIVE}::test_pairs_of_a_group"),
    ("below the mean trained on too", "weight * (max(advantage, 0.0) if", "weight * (abs(advantage) if",
     f"{OBJECTIVE}::test_the_best_of_a_group"),
    ("each sample once whatever its pairs", "weights[key] = weights.get(key, 0.0) + 1.0", "weights[key] = 1.0",
     f"{OBJECTIVE}::test_pairs_of_a_group"),
    ("a group without spread trained on", "if advantages[keys[0]][0] > advantages[keys[-1]][0]}", "if keys}",
     f"{OBJECTIVE}::test_a_group_without_spread_gives_nothing"),
])  # fmt: skip

FORWARDS = mutations("train/forwards.py", GRADIENTS, [
    ("fresh noise the wrong way round", "(1.0 - sigma) * batch.x0 + sigma * batch.states",
     "sigma * batch.x0 + (1.0 - sigma) * batch.states"),
    ("the noise of a step times its slope", "(batch.x_next - mean) / step_slope(schedule, step)",
     "(batch.x_next - mean) * step_slope(schedule, step)"),
    ("the mean on the other side of its noise", "return batch.x_next - step_std", "return batch.x_next + step_std",
     "tests/train/test_train.py::test_the_noise_of_a_step_gives_back_the_mean_it_was_sampled_by"),
    ("the target beyond x", "return (x - batch.x0) / schedule.sigmas[step]",
     "return (batch.x0 - x) / schedule.sigmas[step]"),
    ("the target at the next sigma", "return (x - batch.x0) / schedule.sigmas[step]",
     "return (x - batch.x0) / (schedule.sigmas[step + 1] + 1e-3)"),
    ("the error at another sigma", "target = (x - batch.x0) / self.inputs.rollouts.schedule.sigmas[batch.unit.step]",
     "target = (x - batch.x0) / self.inputs.rollouts.schedule.sigmas[0]", PAIRS),
])  # fmt: skip

LOSSES = mutations("train/batch_loss.py", PARTS, [
    ("partners of a pair with noises of their own", 'shared=config.objective == "dpo"', "shared=False", PAIRS),
    ("the ratio the other way", "log_ratio = scored.log_prob - old_log_prob",
     "log_ratio = old_log_prob - scored.log_prob",
     f"{PARTS} {TRAIN}::test_good_samples_become_likelier_and_bad_ones_less"),
    ("the KL without its weight", "policy_loss.loss + config.kl_beta * kl", "policy_loss.loss + kl"),
    ("the KL rewarded", "policy_loss.loss + config.kl_beta * kl", "policy_loss.loss - config.kl_beta * kl"),
    ("the weight of a step dropped", "loss = self.step_weights[step] * policy_loss.loss", "loss = policy_loss.loss",
     f"{PARTS} {GRADIENTS}"),
    ("proximal_2 for both experts", "second if self.expert == 1 and second is not None else self.config.proximal",
     "second if second is not None else self.config.proximal", GRADIENTS),
    ("the KL of the other objectives dropped", "rows.loss = rows.loss + self.config.kl_beta * rows.kl",
     "rows.loss = rows.loss", PARTS),
    ("the kind of KL ignored", 'self.config.kl if transition else "velocity"', '"velocity"', PARTS),
    ("the clipped ratio without its square", "compared.pull - 0.5 * compared.square, advantage",
     "compared.pull, advantage", GRADIENTS),
    ("SFT of DPO on losers too", "self.config.dpo_sft * wins * error", "self.config.dpo_sft * error", PAIRS),
    ("NFT without the limit of its advantages", "Rows(config.advantage_clip * error,", "Rows(error,", PARTS),
    ("the gain of the reference the other way", "(error - self.forwards.error(batch, x, old)).detach()",
     "(self.forwards.error(batch, x, old) - error).detach()", PAIRS),
])  # fmt: skip

TRAINER = mutations("train/trainer.py", f"{TRAIN}::test_the_gradient_is_the_mean_over_rows_that_count", [
    ("rows not weighted", "loss = (rows.loss * (weight / total)).sum()", "loss = (rows.loss / total).sum()",
     f"{TRAIN}::test_a_sample_of_weight_0_has_no_say {TRAIN}::test_the_gradient_is_the_mean_over_rows_that_count"),
    ("rows not divided by the weight of all", "loss = (rows.loss * (weight / total)).sum()",
     "loss = (rows.loss * weight).sum()"),
    ("a mean of each batch", "loss = (rows.loss * (weight / total)).sum()",
     "loss = (rows.loss * weight / weight.sum()).sum()", f"{TRAIN}::test_chunks_add_up_to_one_big_batch"),
    ("advantages not limited", "advantage = losses.clip_advantage(row([pair[0] for pair in pairs], batch.log_prob), "
     "self.config.advantage_clip)", "advantage = row([pair[0] for pair in pairs], batch.log_prob)",
     f"{PARTS} {TRAIN}::test_the_gradient_is_the_mean_over_rows_that_count"),
    ("the gradient not cut", "state.parameters.values(), self.config.max_grad_norm)",
     "state.parameters.values(), 1e9)", f"{TRAIN}::test_the_gradient_is_cut_to_its_norm_over_all_weights"),
    ("the average takes all of the new", "1.0 - self.config.ema)", "self.config.ema)", AVERAGE),
    ("the average stands still", "1.0 - self.config.ema)", "0.0)", AVERAGE),
    ("warm-up begins at 0", "(self.state.updates + 1) / max(1, self.config.warmup)",
     "self.state.updates / max(1, self.config.warmup)", RATES),
    ("warm-up never ends", "min(1.0, (self.state.updates + 1) / max", "max(1.0, (self.state.updates + 1) / max",
     RATES),
    ("one rate for both experts",
     "return second if self.expert == 1 and second is not None else self.config.learning_rate",
     "return self.config.learning_rate", RATES),
    ("gradients of the update before kept",
     "        started = time.monotonic()\n        self.state.optimizer.zero_grad(set_to_none=True)\n",
     "        started = time.monotonic()\n",
     f"{TRAIN}::test_the_gradient_is_the_mean_over_rows_that_count {TRAIN}::test_kill_and_resume_end_in_the_same_bits"),
    ("weight decay dropped", "weight_decay=config.weight_decay", "weight_decay=0.0", RATES),
    ("betas swapped", "betas=(config.beta1, config.beta2)", "betas=(config.beta2, config.beta1)", RATES),
])  # fmt: skip

GATE = mutations("train/replay.py", REPLAY, [
    ("what is above the limit accepted", "if not ratio <= limit:", "if ratio < limit:"),
    ("a ratio that is no number accepted", "if not ratio <= limit:", "if ratio > limit:"),
    ("ratios below 0 accepted", "- batch.log_prob).abs())", "- batch.log_prob))"),
    ("the mean for the largest", "ratio = max(ratios, key=_badness)", "ratio = min(ratios, key=_badness)"),
    ("the limit of a GPU on a CPU",
     'return 0.0 if torch.device(policy.device).type == "cpu" and ulysses == 1 else limit', "return limit"),
    ("failed samples have to prove something", 'ratio if row["status"] == "ok" else 0.0', "ratio", BROKEN),
    ("one expert alone", "for expert in sorted(experts, reverse=True):", "for expert in sorted(experts)[:1]:"),
    ("one batch of the chosen alone", "            if taken >= samples:\n                break\n",
     "            if taken:\n                break\n"),
])  # fmt: skip

ORDERS = mutations("train/order.py", ORDER, [
    ("every epoch in the same order", 'generator(seed, "order", iteration, epoch, expert)',
     'generator(seed, "order", iteration, expert)'),
    ("both experts in one minibatch", "mine = sorted({unit for unit in units if unit.expert == expert})",
     "mine = sorted({unit for unit in units})"),
    ("the order in which units were listed", "mine = sorted({unit for unit in units if unit.expert == expert})",
     "mine = [unit for unit in units if unit.expert == expert]"),
    ("the last unit of a part twice", "tuple(order[start:stop]) for start, stop",
     "tuple(order[start:stop + 1]) for start, stop"),
    ("padding that counts", "Slot(batch[max(position, 0)], position >= 0)", "Slot(batch[max(position, 0)], True)"),
    ("the last turn dropped", "turns = -(-count // ranks)", "turns = count // ranks"),
])  # fmt: skip

WEIGHTS = mutations("train/weights.py", "tests/train/test_full.py", [
    ("gradients in the dtype of the weights", "gradient = weight.grad.float()", "gradient = weight.grad",
     "tests/train/test_full.py::test_masters_add_gradients_up_in_fp32_and_keep_small_updates"),
    ("the old weights not put back", "            finally:\n                self._put(now)\n",
     "            finally:\n                pass\n",
     f"{GRADIENTS} {TRAIN}::test_kill_and_resume_end_in_the_same_bits"),
    ("the policy of now for the one that sampled", "                self._put(self.kept)\n", "                pass\n",
     GRADIENTS),
])  # fmt: skip

ALL = [
    *ADVANTAGES, *TERMS, *ESTIMATORS, *SELECTION, *FORWARDS, *LOSSES, *TRAINER, *GATE, *ORDERS, *WEIGHTS,
]  # fmt: skip
