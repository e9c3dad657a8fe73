"""Costs that are learned from the steps that run, and the choice among plans that follows them."""

from __future__ import annotations

import random

import pytest

from idlm_kernels.generate import CostTable, Generator, LearnedCosts, PlanPolicy, SamplingParams
from idlm_kernels.generate.plan import StepPlan, plans_up_to


def test_what_was_seen_counts_and_the_rest_follows_it() -> None:
    costs = LearnedCosts(CostTable({1: 1.0, 4: 2.0, 9: 4.0}))
    assert costs.of(4) == 2.0
    costs.observe(1, 0.01)
    assert not costs.knows(1) and costs.of(4) == 2.0, "one step is no knowledge"
    for _ in range(3):
        costs.observe(1, 0.01)
    assert costs.of(1) == 0.01 and costs.of(4) == pytest.approx(0.02) and costs.of(9) == pytest.approx(0.04)
    for seconds in (0.03, 0.03, 0.5):  # a moment's noise
        costs.observe(4, seconds)
    assert costs.of(4) == 0.03 and costs.of(9) == pytest.approx(0.06), "by the nearest that is known"
    for _ in range(LearnedCosts.LATEST):
        costs.observe(1, 0.05)
    assert costs.of(1) == 0.05, "what was long ago is forgotten"


class Machine:
    """Runs windows of a policy with true costs by rows and a true acceptance; tokens per second against AR's."""

    def __init__(self, seconds: CostTable, acceptance: float, noise: float = 0.0):
        self.seconds, self.acceptance, self.noise = seconds, acceptance, noise
        self.random = random.Random(1)

    def step_of(self, plan: StepPlan) -> float:
        return self.seconds.of(plan.max_rows)

    def speed(self, policy: PlanPolicy, windows: int) -> float:
        tokens = time = 0.0
        for _ in range(windows):
            plan = policy.choose(1)
            for _ in range(4 if policy.trial else 16):
                step = self.step_of(plan) * (1 + self.random.random() * self.noise)
                policy.cost.observe(plan.max_rows, step)  # type: ignore[union-attr]
                time += step
                tokens += plan.expected_tpf([self.acceptance] * max(1, plan.num_drafts))
                drafts = plan.num_drafts
                policy.observe([1] * drafts, [self.random.random() < self.acceptance for _ in range(drafts)])
        return tokens / time * self.seconds.of(1) * (1 + self.noise / 2)


PLANS = tuple(plans_up_to("auto", 4))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_where_rows_cost_more_than_they_bring_ar_is_not_lost(noise: float) -> None:
    """The prior says that four rows cost one and a half times one; here they cost three times."""
    steep = Machine(CostTable({1: 1.0, 4: 3.0, 9: 7.0, 16: 12.0}), 0.6, noise)
    policy = PlanPolicy(PLANS, LearnedCosts(), [0.6, 0.6, 0.6])
    assert steep.speed(policy, 40) > 0.9
    assert steep.speed(policy, 100) > 0.98, "what it has learned stays, and trials are short"


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_where_rows_are_cheap_the_gain_is_taken(noise: float) -> None:
    flat = Machine(CostTable({1: 1.0, 16: 1.3}), 0.8, noise)
    policy = PlanPolicy(PLANS, LearnedCosts(), [0.6, 0.6, 0.6])
    flat.speed(policy, 20)
    best = max(plan.expected_tpf([0.8] * 3) / flat.seconds.of(plan.max_rows) for plan in PLANS)
    assert flat.speed(policy, 100) > 0.95 * best


class DisturbedMachine(Machine):
    """Another program runs while ordinary decoding takes its first steps."""

    def __init__(self, seconds: CostTable, acceptance: float):
        super().__init__(seconds, acceptance)
        self.quiet, self.disturbed = seconds, CostTable({rows: 6 * s for rows, s in seconds.seconds.items()})
        self.ar_steps = 0

    def step_of(self, plan: StepPlan) -> float:
        if plan.kind == "ar":
            self.ar_steps += 1
        return (self.disturbed if self.ar_steps in range(1, 5) and plan.kind == "ar" else self.quiet).of(plan.max_rows)


def test_first_steps_that_were_disturbed_are_not_believed_for_good() -> None:
    """Ordinary decoding looked six times slower than it is, and so no plan to try again; each request has a policy."""
    machine, costs = DisturbedMachine(CostTable({1: 1.0, 4: 3.0, 9: 7.0, 16: 12.0}), 0.6), LearnedCosts()
    for _ in range(40):
        machine.speed(PlanPolicy(PLANS, costs, [0.6, 0.6, 0.6]), 6)
    assert machine.ar_steps > 4
    assert machine.speed(PlanPolicy(PLANS, costs, [0.6, 0.6, 0.6]), 100) > 0.97


def test_a_plan_that_is_no_better_than_noise_does_not_replace_the_one_in_use() -> None:
    costs = LearnedCosts(CostTable({1: 1.0}))
    policy = PlanPolicy((StepPlan("ar", 1), StepPlan("quadratic", 2)), costs, [0.0])
    for rows, seconds in ((1, 1.0), (4, 1.0)):
        for _ in range(3):
            costs.observe(rows, seconds)
    first = policy.choose(1)
    other = 4 if first.max_rows == 1 else 1
    for _ in range(LearnedCosts.LATEST):
        costs.observe(other, 0.98)
    assert policy.choose(1) == first
    for _ in range(LearnedCosts.LATEST):
        costs.observe(other, 0.9)
    assert policy.choose(1) != first


def test_a_generator_remembers_what_its_steps_cost(make_generator: object) -> None:
    generator: Generator = make_generator()  # type: ignore[operator]
    assert not generator._costs.knows(1), "nothing is timed beforehand"
    generator.generate([[1, 2]], SamplingParams(max_tokens=60), plan="auto", stride=2)
    assert generator._costs.knows(1), "ordinary decoding, against which nothing may be lost"
    assert generator.policy("auto", 2).cost is generator._costs
