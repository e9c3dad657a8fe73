"""Costs that are learned from the steps that run, and the choice among plans that follows them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from idlm_kernels.generate import CostTable, Generator, LearnedCosts, PlanPolicy, SamplingParams
from idlm_kernels.generate.kept_costs import MOST_KEYS, KeptCosts
from idlm_kernels.generate.plan import StepPlan, plans_up_to


def test_what_was_seen_counts_and_the_rest_follows_it() -> None:
    costs = LearnedCosts(CostTable({1: 1.0, 4: 2.0, 9: 4.0}))
    assert costs.of(1, 4) == 2.0
    for _ in range(3):
        assert not costs.knows(1, 1), "one step is no knowledge"
        costs.observe(1, 1, 0.01)
    assert costs.knows(1, 1) and costs.of(1, 1) == 1 and costs.of(1, 4) == 2
    for seconds in (0.03, 0.03, 0.5):  # a moment's noise
        costs.observe(1, 4, seconds)
    assert costs.of(1, 4) == pytest.approx(3)
    assert costs.of(1, 9) == pytest.approx(7), "a row more costs twice what the prior says"
    assert costs.of(2, 2) == pytest.approx(1 + 2 * (2 / (4 / 3) - 1)), "of another batch too"
    for _ in range(LearnedCosts.LATEST):
        costs.observe(1, 4, 0.015)
    assert costs.of(1, 4) == pytest.approx(1.5), "what was long ago is forgotten"


def test_what_slows_all_steps_changes_no_choice() -> None:
    costs = LearnedCosts()
    for slow in (1.0, 3.0):
        for _ in range(LearnedCosts.LATEST):
            costs.observe(1, 1, slow * 0.01)
        for _ in range(4):
            costs.observe(1, 4, slow * 0.017)
    assert costs.of(1, 4) == pytest.approx(1.7)


def test_plans_without_ordinary_decoding_are_measured_by_each_other() -> None:
    costs = LearnedCosts(CostTable({1: 1.0, 4: 2.0, 9: 4.0}))
    for _ in range(3):
        costs.observe(1, 4, 0.02)
        costs.observe(1, 9, 0.05)
    assert costs.of(1, 4) == pytest.approx(2) and costs.of(1, 9) == pytest.approx(5)


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
                policy.cost.observe(1, plan.max_rows, step)  # type: ignore[union-attr]
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
    for rows in (1, 4):
        for _ in range(3):
            costs.observe(1, rows, 1.0)
    first = policy.choose(1)
    better, much_better = (0.98, 0.9) if first.max_rows == 1 else (1 / 0.98, 1 / 0.9)
    for _ in range(LearnedCosts.LATEST):
        costs.observe(1, 4, better)
    assert policy.choose(1) == first
    for _ in range(LearnedCosts.LATEST):
        costs.observe(1, 4, much_better)
    assert policy.choose(1) != first


def test_a_generator_remembers_what_its_steps_cost(make_generator: object) -> None:
    generator: Generator = make_generator()  # type: ignore[operator]
    assert not generator._costs.knows(1, 1), "nothing is timed beforehand"
    generator.generate([[1, 2]], SamplingParams(max_tokens=60), plan="auto", stride=2)
    assert generator._costs.knows(1, 1), "ordinary decoding, against which nothing may be lost"
    assert generator.policy("auto", 2).cost is generator._costs


def test_ordinary_decoding_comes_first_and_again_now_and_then() -> None:
    """It is what nothing may be lost against, and it may have become another by now."""
    flat = Machine(CostTable({1: 1.0, 16: 1.4}), 0.6)
    policy = PlanPolicy((StepPlan("ar", 1), StepPlan("quadratic", 2)), LearnedCosts(), [0.6])
    assert policy.choose(1).kind == "ar"
    flat.speed(policy, 20)
    kinds = []
    for _ in range(60):
        kinds.append(policy.choose(1).kind)
        flat.speed(policy, 1)
    assert 1 <= kinds.count("ar") <= 15 and kinds.count("quadratic") > 40


class TestKeptCosts:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "folder" / "costs.json"

    def learned(self, path: Path, key: str = "a") -> KeptCosts:
        costs = KeptCosts(path, key)
        for _ in range(LearnedCosts.ENOUGH):
            costs.observe(1, 1, 0.01)
            costs.observe(1, 4, 0.02)
        return costs

    def test_what_one_process_learned_the_next_one_knows(self, path: Path) -> None:
        self.learned(path).keep()
        later = KeptCosts(path, "a")
        assert later.knows(1, 4) and later.of(1, 4) == 2 and not later.knows(1, 1)
        assert not KeptCosts(path, "b").knows(1, 4), "of another machine or model"
        before = path.stat().st_mtime_ns
        later.keep()
        assert path.stat().st_mtime_ns == before, "nothing new"
        self.learned(path, "b").keep()
        assert KeptCosts(path, "a").knows(1, 4) and KeptCosts(path, "b").knows(1, 4)
        assert list(path.parent.iterdir()) == [path], "no file is left beside it"

    @pytest.mark.parametrize(
        "content",
        [
            b"", b"\xff", b"[1]", b'{"a": 3}', b"[" * 100_000, b'{"a": [[1, 4, NaN]]}',
            b'{"a": [[1, 4, -1], [1, true, 2]]}', b'{"a": [[1, 4, 1' + b"0" * 400 + b"]]}",
            b'{"a": [[1, 4, 1e999], [0, 4, 2.0], [1, 1, 2.0], [1, 10000000000, 2.0], ["1", 4, 2.0]]}',
        ],
    )  # fmt: skip
    def test_a_damaged_file_is_as_none(self, path: Path, content: bytes) -> None:
        path.parent.mkdir()
        path.write_bytes(content)
        costs = KeptCosts(path, "a")
        assert not costs.table()
        self.learned(path).keep()
        assert KeptCosts(path, "a").knows(1, 4), "and is replaced"

    def test_a_folder_that_cannot_be_written_costs_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        self.learned(tmp_path / "file" / "costs.json").keep()

    def test_the_file_does_not_grow(self, path: Path) -> None:
        for i in range(MOST_KEYS + 3):
            self.learned(path, str(i)).keep()
        assert not KeptCosts(path, "2").knows(1, 4) and KeptCosts(path, "3").knows(1, 4)
