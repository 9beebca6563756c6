"""The rules of a hypothesis machine that every kind of request is under."""

from __future__ import annotations

from helpers.scheduler_driver import PHASES, Driver
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule


class DriverMachine(RuleBasedStateMachine):
    """Takes the steps of a driver in any order; subclasses add requests."""

    @initialize(
        num_pages=st.integers(12, 40),
        page_size=st.sampled_from([1, 3, 4, 16]),
        max_rows=st.integers(1, 9),
        max_prefill_tokens=st.sampled_from([3, 10, 1000]),
        prefix_caching=st.booleans(),
        lanes=st.sampled_from([1, 2]),
        pace=st.none() | st.integers(0, 99),
    )
    def start(
        self,
        num_pages: int,
        page_size: int,
        max_rows: int,
        max_prefill_tokens: int,
        prefix_caching: bool,
        lanes: int,
        pace: int | None,
    ) -> None:
        self.driver = Driver(
            num_pages=num_pages,
            page_size=page_size,
            max_rows=max_rows,
            lanes=lanes,
            pace=pace,
            max_prefill_tokens=max_prefill_tokens,
            prefix_caching=prefix_caching,
        )

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.driver.alive:
            self.driver.abort(data.draw(st.sampled_from(self.driver.alive)))

    @rule(issue=st.booleans())
    def plan(self, issue: bool) -> None:
        if len(self.driver.out) < self.driver.lanes:
            self.driver.plan()
            if issue:
                self.driver.issue(len(self.driver.out))

    @rule()
    def commit(self) -> None:
        if self.driver.out:
            self.driver.commit()

    @rule(issued=st.integers(0, 2), phases=st.integers(0, PHASES))
    def cancel(self, issued: int, phases: int) -> None:
        if self.driver.out:
            self.driver.issue(issued, phases)
            self.driver.cancel()

    @invariant()
    def pages_add_up(self) -> None:
        if hasattr(self, "driver"):
            self.driver.scheduler.check()

    @invariant()
    def nobody_is_lost(self) -> None:
        if hasattr(self, "driver"):
            scheduler = self.driver.scheduler
            assert scheduler.num_waiting >= 0
            assert scheduler.num_running + scheduler.num_waiting == len(self.driver.alive)

    def teardown(self) -> None:
        """Whatever is left ends in a bounded number of rounds."""
        if hasattr(self, "driver"):
            self.driver.finish(400 + 200 * len(self.driver.specs))
