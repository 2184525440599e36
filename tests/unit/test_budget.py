"""Budgets: parsing, conversion from rho, caps and slots by hand, and how an infeasible one is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest

from heatkv_cli.core.budget import Budget, decimal_up
from heatkv_cli.core.scales import Geometry, ScaleSchedule
from heatkv_cli.errors import BudgetError, ConfigError
from heatkv_cli.methods.heatkv.orders import random_orders
from heatkv_cli.methods.heatkv.scheduler import prune_counts, removal_schedule, smallest_budget

INFINITY = ScaleSchedule.squares((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
VAR = ScaleSchedule.squares((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
TWO_B = Geometry("infinity-2b", 32, 16, 128, INFINITY, 3, dtype_bytes=2)


@pytest.mark.parametrize(
    ("value", "ratio", "text"),
    [
        ("0.1", Fraction(1, 10), "0.1"),
        (" .25 ", Fraction(1, 4), ".25"),
        ("1e-2", Fraction(1, 100), "1e-2"),
        ("21/6425", Fraction(21, 6425), "21/6425"),
        (0.1, Fraction(1, 10), "0.1"),
        (0.15, Fraction(3, 20), "0.15"),
        (1, Fraction(1), "1"),
        (1.0, Fraction(1), "1.0"),
        (Fraction(2, 3), Fraction(2, 3), "2/3"),
    ],
)
def test_parse(value: str | float, ratio: Fraction, text: str) -> None:
    budget = Budget.parse(value)
    assert (budget.ratio, budget.text, str(budget)) == (ratio, text, text)
    assert budget.as_float == float(ratio)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "nothing would be kept"),
        (-0.1, "nothing would be kept"),
        ("-1/2", "nothing would be kept"),
        ("1.01", "more than the full cache"),
        (10, "more than the full cache"),
        ("ten", "'ten', which is not a number"),
        ("", "not a number"),
        ("10%", "not a number"),
        ("1/0", "division by zero"),
        (float("nan"), "not a number"),
        (float("inf"), "not a number"),
        ("1e999999999", "not a number"),
        (True, "not a number"),
        ("0.1.2", "not a number"),
    ],
)
def test_parse_refuses(value: str | float, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Budget.parse(value)
    assert "budget=0.1" in error.value.hint


def test_a_percentage_is_recognised() -> None:
    with pytest.raises(ConfigError) as error:
        Budget.parse("15")
    assert error.value.hint.endswith("15 % is budget=0.15")


@pytest.mark.parametrize(
    ("schedule", "rho", "beta"),
    [
        (INFINITY, "0.5", 0.819),
        (INFINITY, "0.7", 0.491),
        (INFINITY, 0.9, 0.164),
        (VAR, "0.7", 0.481),
        (VAR, 0.9, 0.160),
    ],
)
def test_rho_is_converted(schedule: ScaleSchedule, rho: str | float, beta: float) -> None:
    budget = Budget.from_rho(rho, schedule)
    assert budget.as_float == pytest.approx(beta, abs=5e-4)  # docs/bytes.md
    assert budget.rho == Fraction(str(rho))
    assert budget.text == f"rho={rho}"
    assert budget.cap(schedule) == int((1 - Fraction(str(rho))) * schedule.num_tokens)


def test_small_rho_needs_more_than_the_full_cache() -> None:
    budget = Budget.from_rho("0.3", INFINITY)
    assert budget.ratio == 1  # the pool
    assert budget.cap(INFINITY) == 7364 > INFINITY.peak_tokens  # the method's own cap
    assert Budget.from_rho(0, INFINITY).cap(INFINITY) == INFINITY.num_tokens


@pytest.mark.parametrize("rho", [1, -0.1, "1.5", "all", float("nan")])
def test_bad_rho(rho: str | float) -> None:
    with pytest.raises(ConfigError, match="rho is") as error:
        Budget.from_rho(rho, INFINITY)
    assert "rho=0.7" in error.value.hint


@pytest.mark.parametrize(("text", "cap"), [("0.1", 642), ("0.04", 257), ("0.2", 1285), ("650/6425", 650), ("1", 6425)])
def test_caps(text: str, cap: int) -> None:
    assert Budget.parse(text).cap(INFINITY) == cap


def test_slots_by_hand() -> None:
    budget = Budget.parse("0.1")
    assert budget.slots(TWO_B, rows=1) == 328_960 == budget.slots(TWO_B, rows=16)
    assert budget.slots(TWO_B, rows=2, state_bytes=4) == 328_960 * 512 // 516
    assert Budget.parse(1).slots(TWO_B, rows=2) == TWO_B.full_tokens


@pytest.mark.parametrize("text", ["0.1", "1/3", "0.0401", "21/6425", "650/6425"])
@pytest.mark.parametrize("state_bytes", [0, 4, 6])
def test_slots_are_the_most_that_fit(text: str, state_bytes: int) -> None:
    budget = Budget.parse(text)
    slot = 2 * (TWO_B.bytes_per_token + state_bytes)
    slots = budget.slots(TWO_B, 2, state_bytes)
    assert slots * slot <= budget.ratio * TWO_B.full_bytes(2) < (slots + 1) * slot


def test_slug_is_a_file_name() -> None:
    assert Budget.parse("21/6425").slug == "21of6425"
    assert Budget.from_rho("0.7", VAR).slug == "rho0.7"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(21, 6425), "0.00326849"),
        (Fraction(57, 6425), "0.0088716"),
        (Fraction(1, 3), "0.333334"),
        (Fraction(1, 8), "0.125"),
        (Fraction(1), "1"),
        (Fraction(999_999_999, 1_000_000_000), "1"),
    ],
)
def test_decimals_are_rounded_up(value: Fraction, text: str) -> None:
    assert decimal_up(value) == text
    assert Fraction(text) >= value


def test_an_infeasible_budget_names_the_smallest() -> None:
    with pytest.raises(BudgetError) as error:
        Budget.parse("0.003").require(smallest_budget(TWO_B), TWO_B, "heatkv")
    assert error.value.message == (
        "budget 0.003 is too small for method heatkv on infinity-2b: "
        "the smallest feasible budget is 21/6425 (0.00326849)"
    )
    assert error.value.hint == "type budget=21/6425 or budget=0.00326849, or more"
    assert error.value.exit_code == 2
    for text in ("21/6425", "0.00326849"):
        Budget.parse(text).require(smallest_budget(TWO_B), TWO_B, "heatkv")
    with pytest.raises(BudgetError):
        prune_counts(TWO_B, Budget.parse("0.00326848"))
    with pytest.raises(BudgetError, match="method random on"):
        removal_schedule(TWO_B, Budget.parse("0.003"), random_orders(TWO_B, 0), "random")


def test_counts_by_hand() -> None:
    # C = 0, 1, 5, 14 entering scales 0..3; P = 14, one sink token, 4 heads in all, budget 7 tokens per head
    toy = Geometry("toy", 2, 2, 8, ScaleSchedule.squares((1, 2, 3, 4)), 1)
    assert prune_counts(toy, Budget.parse("0.5")) == (0, 0, 0, 3)  # ceil(4 * (14 - 7) / (14 - 1))
    assert prune_counts(toy, Budget.parse("1/4")) == (0, 0, 2, 4)  # ceil(4 * 1.5 / 4), ceil(4 * 10.5 / 13)
    assert prune_counts(toy, Budget.parse("1/14")) == (0, 0, 4, 4)


def test_rounding_does_not_refuse_the_smallest_budget() -> None:
    # 2/49 * 49 is 2 - 2e-16 in doubles: below the two sink tokens, and one head too many at C = 3
    odd = Geometry("odd", 1, 1, 8, ScaleSchedule(((1, 2), (1, 1), (1, 46), (2, 2))), 1)
    budget = Budget.parse("2/49")
    assert budget.as_float * 49 < 2
    assert prune_counts(odd, budget) == (0, 0, 1, 1)
    assert removal_schedule(odd, budget, random_orders(odd, 0)).physical_peak_tokens == 2


def test_own_counts_can_be_infeasible() -> None:
    toy = Geometry("toy", 2, 2, 8, ScaleSchedule.squares((1, 2, 3, 4)), 1)
    orders = random_orders(toy, 0)
    with pytest.raises(BudgetError, match=r"after layer 1 wrote scale 2 the cache holds 30 tokens, the budget is 28.0"):
        removal_schedule(toy, Budget.parse("0.5"), orders, counts=(0, 0, 0, 2))
    for counts in [(0, 0, 3, 2), (0, 1, 2, 2), (0, 0, 0), (0, 0, 0, 5), (0, 0, -1, 0)]:
        with pytest.raises(ConfigError, match=r"counts .* do not fit"):
            removal_schedule(toy, Budget.parse("0.5"), orders, counts=counts)
