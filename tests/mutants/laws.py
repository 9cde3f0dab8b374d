"""Mutations of the laws, the steps, the schedule, the window and the policy that they move."""

from __future__ import annotations

from tests.mutants.mutation import mutations

LAW = "tests/rollout/test_transitions.py"
CPS = "tests/rollout/test_cps.py"
WINDOW = "tests/rollout/test_window.py"
SCHEDULE = "tests/rollout/test_schedule.py"
STEPS = "tests/rollout/test_step.py"
SAMPLES = "tests/rollout/test_rollout.py::test_a_shard_holds_what_the_format_promises"
PIPELINE = "tests/rollout/test_policy.py::test_the_loop_equals_the_pipeline_bit_for_bit"
SEEDS = "tests/rollout/test_sampler.py"

TRANSITIONS = mutations("rollout/transitions.py", LAW, [
    ("flow-sde without its guard", "eta * math.sqrt(sigma / max(1.0 - sigma, 1.0 - sigma_1))",
     "eta * math.sqrt(sigma / max(1.0 - sigma, 1e-9))"),
    ("flow-sde without its root", "eta * math.sqrt(sigma / max(1.0 - sigma, 1.0 - sigma_1))",
     "eta * (sigma / max(1.0 - sigma, 1.0 - sigma_1))"),
    ("flow-sde upside down", "eta * math.sqrt(sigma / max(1.0 - sigma, 1.0 - sigma_1))",
     "eta * math.sqrt(max(1.0 - sigma, 1.0 - sigma_1) / sigma)"),
    ("dance-sde grows with sigma", '    if law == "dance-sde":\n        return eta\n',
     '    if law == "dance-sde":\n        return eta * sigma\n'),
    ("wan-sde without sigma_1", "return eta * sigma_1 * sigma", "return eta * sigma"),
    ("c of flow-sde with eta instead of its half square", "return math.exp(-0.5 * eta**2 * _log_snr_gain(",
     "return math.exp(-eta * _log_snr_gain("),
    ("c of dance-sde with the sigmas swapped", "(1.0 / sigma_next - 1.0 / sigma))",
     "(1.0 / sigma - 1.0 / sigma_next))"),
    ("c of wan-sde without its half", "math.exp(-0.5 * (eta * sigma_1) ** 2", "math.exp(-1.0 * (eta * sigma_1) ** 2"),
    ("c of wan-sde with the sigmas swapped", "** 2 * (sigma - sigma_next))", "** 2 * (sigma_next - sigma))"),
    ("cps with the sine", "math.cos(0.5 * math.pi * eta)", "math.sin(0.5 * math.pi * eta)"),
    ("cps with the whole angle", "math.cos(0.5 * math.pi * eta)", "math.cos(math.pi * eta)"),
    ("dpm-sde with half its eta", "return math.exp(-eta * _log_snr_gain",
     "return math.exp(-0.5 * eta * _log_snr_gain"),
    ("the step to 0 keeps its noise", '    if law == "ode" or sigma_next == 0:\n        return Kernel',
     '    if law == "ode":\n        return Kernel'),
    ("the sign of the Euler step", "Kernel(1.0, sigma_next - sigma, 0.0)", "Kernel(1.0, sigma - sigma_next, 0.0)"),
    ("the drift without its half", "drift = g**2 / (2 * sigma)", "drift = g**2 / sigma"),
    ("the drift over the next sigma", "drift = g**2 / (2 * sigma)", "drift = g**2 / (2 * sigma_next)"),
    ("the drift pushes the other way", "Kernel(1.0 - length * drift,", "Kernel(1.0 + length * drift,"),
    ("the drift's share of the velocity dropped", "-length * (1.0 + drift * (1.0 - sigma))", "-length * 1.0"),
    ("std without the root of the step length", "g * math.sqrt(length))", "g * length)"),
    ("std per unit of time", "g * math.sqrt(length))", "g)"),
    ("the exact mean weighs noise with the wrong sigma",
     "on_velocity = -sigma * (1.0 - sigma_next) + sigma_next * c * (1.0 - sigma)",
     "on_velocity = -sigma * (1.0 - sigma_next) + sigma_next * c * (1.0 - sigma_next)"),
    ("the exact mean takes the velocity the other way", "on_velocity = -sigma * (1.0 - sigma_next) +",
     "on_velocity = sigma * (1.0 - sigma_next) +"),
    ("the exact mean keeps no noise", "Kernel(1.0 - sigma_next + sigma_next * c,", "Kernel(1.0 - sigma_next,"),
    ("the exact std without its root", "sigma_next * math.sqrt((1.0 - c) * (1.0 + c))",
     "sigma_next * (1.0 - c) * (1.0 + c)"),
    ("the exact std with 1 - c alone", "math.sqrt((1.0 - c) * (1.0 + c))", "math.sqrt(1.0 - c)"),
    ("the exact std at the wrong sigma", "sigma_next * math.sqrt((1.0 - c)", "sigma * math.sqrt((1.0 - c)"),
    ("the second order dropped", 'if law == "dpm-sde-2m" and previous is not None:', "if False:"),
    ("the second order subtracted", "mean = mean + _second_order(", "mean = mean - _second_order("),
    ("computed in the dtype of the input", "    x, velocity = x.float(), velocity.float()\n    mean = k.on_x",
     "    mean = k.on_x"),
    ("the gradient scale times std", "else 1 / k.std)", "else k.std)"),
    ("the gradient scale of cps-unnormalised as a density's",
     'slope * (2 * k.std if law == "cps-unnormalised" else 1 / k.std)', "slope / k.std", CPS),
    ("the slope without the second order", "on_velocity -= sigma * _second_order_weight",
     "on_velocity -= 0 * _second_order_weight"),
    ("a deviation not squared", "((x_next.float() - mean.float()) ** 2) / (2 * scale**2)",
     "((x_next.float() - mean.float()).abs()) / (2 * scale**2)"),
    ("a log-prob without its half", "/ (2 * scale**2) - scale.log()", "/ (scale**2) - scale.log()"),
    ("a log-prob with the std not squared", "/ (2 * scale**2) - scale.log()", "/ (2 * scale) - scale.log()"),
    ("a log-prob without the log of its std", " - scale.log() - _HALF_LOG_2PI", " - _HALF_LOG_2PI"),
    ("a log-prob without the log of 2 pi", " - scale.log() - _HALF_LOG_2PI", " - scale.log()"),
    ("the sign of a log-prob", "density = -((x_next", "density = ((x_next"),
    ("cps-unnormalised normalised",
     '    if law == "cps-unnormalised":\n        return cps_unnormalised_log_prob(x_next, mean, mask)\n', "", CPS),
    ("the sign of cps-unnormalised", "return average(-((x_next.float()", "return average(((x_next.float()", CPS),
    ("sums instead of means", "return values.flatten(1).mean(1)", "return values.flatten(1).sum(1)"),
    ("a mean over all where a mask is", "torch.where(keep, values.flatten(1), 0.0).sum(1) / keep.sum(1)",
     "torch.where(keep, values.flatten(1), 0.0).mean(1)"),
    ("the mask the other way round", "keep = (mask != 0)", "keep = (mask == 0)"),
    ("the Euler step the other way", "return x.float() + (sigma_next - sigma) * velocity.float()",
     "return x.float() - (sigma_next - sigma) * velocity.float()"),
    ("dpm-2m with the noise of an sde",
     "_second_order(x.float(), velocity.float(), sigma, sigma_next, 0.0, previous)",
     "_second_order(x.float(), velocity.float(), sigma, sigma_next, 1.0, previous)"),
    ("the clean estimate beyond the noise", "return x.float() - sigma * velocity.float()",
     "return x.float() + sigma * velocity.float()"),
    ("the step left out of the seed", '{prompt_id} {sample} {step}"', '{prompt_id} {sample}"'),
    ("the iteration left out of the seed", "noise {run_seed} {iteration} {prompt_id}",
     "noise {run_seed} {prompt_id}"),
    ("a seed of 32 bits", "Philox(key=seed)", "Philox(key=seed & 0xFFFFFFFF)"),
    ("the sign of the log-SNR", "math.log((1.0 - sigma) / sigma) if", "math.log(sigma / (1.0 - sigma)) if"),
    ("the guard at every step", "edge = max(min(sigma, sigma_1), sigma_next)", "edge = sigma_next"),
    ("the guarded part dropped", "return below + above", "return below"),
    ("the weight of the second order without its half", "return -0.5 * (1.0 - sigma_next) * math.expm1(",
     "return -1.0 * (1.0 - sigma_next) * math.expm1("),
    ("the ratio of the steps upside down", "math.expm1(-(1.0 + eta) * h) * h / h0",
     "math.expm1(-(1.0 + eta) * h) * h0 / h"),
    ("the estimates of the second order swapped", "(clean_estimate(x, velocity, sigma) - before.detach().float())",
     "(before.detach().float() - clean_estimate(x, velocity, sigma))"),
])  # fmt: skip

STEP = mutations("rollout/step.py", STEPS, [
    ("the log-prob taken before rounding",
     "    x_next = (mean + std * noise).to(storage).float()\n    mask = policy.free_mask(x, "
     "inputs.condition)\n    return StepTaken(x_next, law_log_prob(schedule.law, x_next,",
     "    x_next = (mean + std * noise).to(storage).float()\n    mask = policy.free_mask(x, "
     "inputs.condition)\n    return StepTaken(x_next, law_log_prob(schedule.law, (mean + std * noise),"),
    ("noise with the variance for its deviation", "x_next = (mean + std * noise)",
     "x_next = (mean + std**2 * noise)"),
    ("the noise subtracted", "x_next = (mean + std * noise)", "x_next = (mean - std * noise)"),
    ("the solver ignored", 'if schedule.solver == "dpm-2m":', "if False:"),
    ("the guard at the step's own sigma", "sigma_1=schedule.sigmas[1],", "sigma_1=schedule.sigmas[step],"),
    ("history with the sigma of now", "return x0_prev, schedule.sigmas[step - 1]",
     "return x0_prev, schedule.sigmas[step]"),
    ("the timestep of the next step", "schedule.experts[step], schedule.timesteps[step], schedule.guidance[step]",
     "schedule.experts[step], schedule.timesteps[min(step + 1, schedule.steps - 1)], schedule.guidance[step]"),
    ("the guidance of the first step", "schedule.timesteps[step], schedule.guidance[step]",
     "schedule.timesteps[step], schedule.guidance[0]"),
])  # fmt: skip

WINDOWS = mutations("rollout/window.py", WINDOW, [
    ("the last step of all in the window", "final, first, last = schedule.steps - 1, config",
     "final, first, last = schedule.steps, config"),
    ("last_step left out of the range", "return range(first, last + 1)", "return range(first, last)"),
    ("the first step of the range left out", "        return range(first, final)",
     "        return range(first + 1, final)"),
    ("the quotas of the experts swapped", "config.low_steps if expert == LOW_NOISE else config.high_steps",
     "config.high_steps if expert == LOW_NOISE else config.low_steps"),
    ("one step more than the quota", "return sorted(candidates, key=keys.__getitem__)[:quota]",
     "return sorted(candidates, key=keys.__getitem__)[:quota + 1]"),
    ("progressive stops one short of the end", "% (len(candidates) - quota + 1)",
     "% max(1, len(candidates) - quota)"),
    ("progressive moves at every iteration", "max(iteration, 0) // config.window_iterations %",
     "max(iteration, 0) %"),
    ("fixed takes the last steps", "return candidates[:quota]", "return candidates[-quota:]"),
    ("random without the seed of the run", "rushes window {config.seed} {salt}", "rushes window {salt}"),
    ("all groups share a window", 'f"{iteration} {prompt_id} {expert}"', 'f"{iteration} {expert}"'),
    ("the steps of the other expert", "if schedule.experts[step] == expert]\n        quota",
     "if schedule.experts[step] != expert]\n        quota"),
])  # fmt: skip

SCHEDULES = mutations("rollout/schedule.py", SCHEDULE, [
    ("the boundary belongs to the low-noise expert", "HIGH_NOISE if t >= boundary", "HIGH_NOISE if t > boundary"),
    ("the experts swapped", "HIGH_NOISE if t >= boundary * train_steps else LOW_NOISE",
     "LOW_NOISE if t >= boundary * train_steps else HIGH_NOISE"),
    ("the boundary a share of the steps", "t >= boundary * train_steps else", "t >= boundary * len(timesteps) else"),
    ("the guidance of the experts swapped", "float(np.float32(scales[expert])) for",
     "float(np.float32(scales[expert - 1])) for"),
    ("an evaluation with noise", 'law: Law = "ode" if evaluation is not None else config.law',
     "law: Law = config.law"),
    ("the sigma of the step before for the next", "        schedule.sigmas[step + 1],\n        schedule.eta,",
     "        schedule.sigmas[step],\n        schedule.eta,"),
])  # fmt: skip

GRIDS = mutations("rollout/sigmas.py", SCHEDULE, [
    ("the shift twice", "sigmas = shift * line / (1 + (shift - 1) * line)",
     "sigmas = shift * line / (1 + shift * line)"),
    ("the grid to 0", "np.linspace(1.0, 1.0 / train_steps, steps + 1)", "np.linspace(1.0, 0.0, steps + 1)"),
    ("whole timesteps", "(sigmas * np.float32(train_steps)).tolist()",
     "(sigmas * np.float32(train_steps)).round().tolist()"),
])  # fmt: skip

SAMPLER = mutations("rollout/sampler.py", SEEDS, [
    ("every step of a sample with the same noise",
     "return noise_seed(plan.seed, iteration, self.groups[group].prompt_id, sample, step)",
     "return noise_seed(plan.seed, iteration, self.groups[group].prompt_id, sample, INITIAL)"),
    ("all groups with the same noise", "self.groups[group].prompt_id, sample, step)", "0, sample, step)"),
    ("a group from one initial noise", "if step == INITIAL and plan.same_initial_noise:", "if step == INITIAL:"),
    ("the state before a step kept for the one after", "self._keep(chunk, state, step + 1, x)",
     "self._keep(chunk, state, step, x)"),
    ("the initial noise not rounded", "State(self._drawn(chunk, INITIAL).to(self.storage).float())",
     "State(self._drawn(chunk, INITIAL))"),
])  # fmt: skip

GUIDANCE = mutations("rollout/policy/wan.py", f"{PIPELINE}[t2v]", [
    ("guidance one too weak", "return unconditional + guidance * (conditional - unconditional)",
     "return unconditional + (guidance - 1) * (conditional - unconditional)"),
    ("guidance towards the negative prompt", "return unconditional + guidance * (conditional - unconditional)",
     "return unconditional - guidance * (conditional - unconditional)"),
    ("prompts swapped", "for one in (prompt_embeds, negative_embeds))", "for one in (negative_embeds, prompt_embeds))"),
    ("a given frame of noise", "return x if mask is None else (1 - mask) * condition + mask * x",
     "return x if mask is None else x", f"{PIPELINE}[ti2v with image]"),
    ("the given frame free and the others not", "mask[:, :, : condition.shape[2]] = 0",
     "mask[:, :, condition.shape[2] :] = 0", f"{PIPELINE}[ti2v with image]"),
])  # fmt: skip

LAYOUT = mutations("rollout/policy/folder.py", "tests/rollout/test_policy.py::test_layouts_are_read_from_the_folder", [
    ("the boundary of a model ignored", "    return float(ratio)\n", "    return 0.875\n"),
])  # fmt: skip

ALL = [*TRANSITIONS, *STEP, *WINDOWS, *SCHEDULES, *GRIDS, *SAMPLER, *GUIDANCE, *LAYOUT]
