"""Documents that are put in order for a query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from ..artifact.exits import Exits
from ..errors import RuleError
from ..rules.measures import Floats, Mask
from ..rules.rules import Budget, ExitRule, TopK
from ..rules.settling import Settled
from .queries import QueryRunner
from .task import Task, Tolerance


class Ranking(Task):
    """One logit for each document of a query: how well it answers the query."""

    unit = "queries"
    item = "document"
    does = "ranks documents"
    models = "rerankers"
    method = "rank"
    compares = True
    has_one_logit = True
    rules: ClassVar[Mapping[str, type[ExitRule]]] = {"budget": Budget, "top-k": TopK}

    @property
    def name(self) -> str:
        """Its name for readers."""
        return "ranking of documents"

    def default_rule(self, exits: range) -> ExitRule:
        """All layers for all documents, because no other order can be promised."""
        return Budget(exit=exits[-1])

    def runner(self, rule: ExitRule, exits: range) -> QueryRunner:
        """A runner for a rule by which some documents run all layers; see `Task.runner`."""
        runner = self.rule_runner(rule, exits)
        stops = min(runner.last, rule.exit) if isinstance(rule, Budget) else runner.last
        if stops < exits[-1]:
            raise RuleError(
                f"the rule stops all documents at exit {stops}, so none has the score of the model",
                f"give a rule that reaches exit {exits[-1]}, without an earlier `max_exit`",
            )
        return QueryRunner(runner)

    def _check_rule(self, rule: ExitRule) -> None:
        # `Budget` compares nothing, so it fits any task.
        if not rule.ranks and not isinstance(rule, Budget):
            raise RuleError(
                f"rule {rule.name} is for classification, and the task is "
                f"{self.record.problem_type.value}",
                f"choose from {', '.join(self.rules)}",
            )

    def near_ties(self, logits: Floats, tolerance: Tolerance) -> Mask:
        """Where the logit is too close to 0."""
        return np.asarray(np.abs(logits[..., 0]) <= tolerance)

    def results(self, settled: Settled, missed: Mask, exits: Exits) -> list[None]:
        """None for each: what a document answers depends on the others, see `ranked`."""
        return [None] * len(settled.rows)
