"""Which plan a batch should run: the one of most expected tokens per second. Without effect on output in `match`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from idlm_kernels.generate.costs import CostTable, LearnedCosts
from idlm_kernels.generate.options import DecodeOptions
from idlm_kernels.generate.plan import StepPlan, plans_up_to
from idlm_kernels.model.transformer import Transformer

# What is expected of the drafts of a model that says nothing of it: one trained with a MASK token, and any other.
_ACCEPTANCE_OF_MASK_MODELS = (0.8,)
_ACCEPTANCE_UNTRAINED = (0.15, 0.05)
_AUTO_STRIDE = 4

@dataclass
class PlanPolicy:
    """Chooses among plans by batch size, costs and the acceptance seen so far.

    acceptance: by draft index, given that all before were accepted; what is known of the model at first, then a fading
    average of what is seen. memory: drafts after which an observation has faded to 1 / e.

    Costs that are learned are learned here. Ordinary decoding gets a few steps first, and again now and then: others
    are measured by it, and no token is lost by it. A plan that could be the best and whose cost is not known
    gets a few steps, a rival now and then a few more. The plan in use stays until another is better by more than
    noise.
    """

    plans: tuple[StepPlan, ...]
    cost: CostTable | LearnedCosts
    acceptance: list[float] = field(default_factory=lambda: [0.6])
    memory: float = 64.0
    trial: bool = field(default=False, init=False)  # the latest choice is to learn a cost: a few steps are enough
    _current: StepPlan | None = field(default=None, init=False, repr=False)

    MARGIN = 1.03  # by which another plan has to be better
    IN_REACH = 0.85  # of the best plan's speed: a plan whose cost is worth knowing
    RETRY = 24  # choices after which the next best plan is tried again
    FRESH = 4  # choices after which ordinary decoding is run again, against which nothing may be lost
    CLEAR = 1.25  # times its speed: a gain so large needs no such check, but now and then

    def choose(self, batch: int) -> StepPlan:
        """The plan of most expected tokens per second for this many requests."""
        costs = self.cost
        if not isinstance(costs, LearnedCosts):
            return max(self.plans, key=lambda p: p.expected_tpf(self.acceptance) / costs.of(batch * p.max_rows))
        speed = {p: p.expected_tpf(self.acceptance) / costs.of(batch, p.max_rows) for p in self.plans}
        ranked = sorted(self.plans, key=lambda p: -speed[p])
        self.trial = False
        if len(ranked) == 1:
            return ranked[0]
        costs.choices_since_trial += 1
        costs.choices_since_ordinary += 1
        in_reach = [p for p in ranked if speed[p] >= self.IN_REACH * speed[ranked[0]]]
        ordinary = [p for p in ranked if p.kind == "ar"]
        wait = self.FRESH if speed[ranked[0]] < self.CLEAR else self.RETRY
        if ordinary and (not costs.knows(batch, 1) or costs.choices_since_ordinary > wait):
            wanted = ordinary
        else:
            wanted = [p for p in in_reach if not costs.knows(batch, p.max_rows)]
            if not wanted and costs.choices_since_trial >= self.RETRY:
                wanted = [p for p in in_reach[:2] if p != self._current]
        if wanted:
            self.trial = wanted[0] != self._current
            if wanted[0].kind == "ar":
                costs.choices_since_ordinary = 0
            else:
                costs.choices_since_trial = 0
            return wanted[0]
        if self._current not in in_reach or speed[ranked[0]] > self.MARGIN * speed[self._current]:
            self._current = ranked[0]
        if self._current.kind == "ar":
            costs.choices_since_ordinary = 0
        return self._current

    def observe(self, verified: Sequence[int], accepted: Sequence[int]) -> None:
        """Take note, by draft index, of drafts that were verified, given that all before them were."""
        for j, (seen, kept) in enumerate(zip(verified, accepted, strict=True)):
            if seen:
                self.acceptance += self.acceptance[-1:] * (j + 1 - len(self.acceptance))
                weight = seen / (seen + self.memory)
                self.acceptance[j] += weight * (kept / seen - self.acceptance[j])

    @property
    def widest(self) -> StepPlan:
        """The plan with the most rows, which sizes pages and tables."""
        return max(self.plans, key=lambda plan: plan.max_rows)

    @property
    def num_drafts(self) -> int:
        return max(plan.num_drafts for plan in self.plans)

    @classmethod
    def of(
        cls,
        model: Transformer,
        options: DecodeOptions,
        costs: LearnedCosts | None = None,
    ) -> PlanPolicy:
        """The choice that the plan, stride and row_budget of the options leave.

        costs: on a CPU, what earlier steps of this model have told; it goes on learning.
        """
        plan, stride, row_budget = options.plan, options.stride, options.row_budget
        acceptance = _expected_acceptance(model)
        longest = stride
        if longest == "auto":
            longest = _AUTO_STRIDE if model.acceptance is None else len(acceptance) + 1
        if plan != "auto" and stride != "auto":
            chosen = StepPlan(plan, longest) if row_budget is None else StepPlan.within(row_budget, plan, longest)
            return cls.fixed(chosen)
        plans = plans_up_to(plan, StepPlan("chain", longest).stride, row_budget)
        if len(plans) == 1:
            return cls.fixed(plans[0])
        if model.device.type != "cpu":
            return cls(tuple(plans), CostTable.roofline(model), list(acceptance))
        # Half the memory: one request has to find out for itself, within its few hundred tokens, that its drafts fail.
        return cls(tuple(plans), costs or LearnedCosts(), list(acceptance), memory=32.0)

    @classmethod
    def fixed(cls, plan: StepPlan) -> PlanPolicy:
        return cls((plan,), CostTable({1: 1.0}))


def _expected_acceptance(model: Transformer) -> Sequence[float]:
    if model.acceptance is not None:
        return model.acceptance
    return _ACCEPTANCE_UNTRAINED if model.config.mask_token_id is None else _ACCEPTANCE_OF_MASK_MODELS
