"""Systems held against each other: the same questions on both sides, loops apart, and which way is better."""

import math

import pytest

from medusa_apar.eval.quality_compare import GOALS, METRICS, compared, differences, means, verdict

ASKED = [f"q{n}" for n in range(6)]


def answers(likelihood=-1.0, repeated=0.1, checks=0.5, looping=(), repeats=1):
    return {
        (id, repeat): {
            "likelihood": likelihood,
            "repeated_4grams": repeated,
            "checks": checks,
            "looping": float(id in looping),
        }
        for id in ASKED
        for repeat in range(repeats)
    }


def reached(measured, ours="threads", theirs="ours-ar"):
    rows = verdict(measured, ASKED, ASKED)
    return {row["metric"]: row for row in rows if (row["ours"], row["theirs"]) == (ours, theirs)}


def test_a_change_for_the_better_is_above_zero_and_two_percent_worse_is_within_the_goal():
    measured = {"ours-ar": answers(), "threads": answers(-1.01, 0.13, 0.49)}
    found = reached(measured)
    assert found["likelihood"]["difference"] == pytest.approx(math.exp(-0.01) - 1)
    assert found["repeated_4grams"]["difference"] == pytest.approx(-0.03)
    assert found["checks"]["difference"] == pytest.approx(-0.01)
    assert [found[goal.metric]["reached"] for goal in GOALS] == [True, False, True]
    better = reached({"ours-ar": answers(), "threads": answers(-0.5, 0.0, 1.0)})
    assert all(row["difference"] > 0 and row["reached"] for row in better.values())


def test_it_is_the_lower_end_that_decides():
    measured = {"ours-ar": answers(), "threads": answers()}
    for number, figures in enumerate(measured["threads"].values()):
        figures["checks"] += 0.3 if number % 2 else -0.3
    found = reached(measured)["checks"]
    assert found["difference"] == pytest.approx(0) and found["low"] < -0.02 < 0.02 < found["high"]
    assert found["reached"] is False
    assert all(row["low"] <= row["difference"] <= row["high"] for row in reached(measured).values())


def test_questions_on_which_one_of_the_two_loops_are_left_out_of_the_likelihood_alone():
    measured = {"ours-ar": answers(looping=("q1",)), "threads": answers(looping=("q2",))}
    measured["threads"]["q1", 0]["likelihood"] = measured["ours-ar"]["q2", 0]["likelihood"] = -0.01
    found = reached(measured)
    assert found["likelihood"]["questions"] == 4 and found["likelihood"]["difference"] == 0
    assert found["repeated_4grams"]["questions"] == found["checks"]["questions"] == 6
    assert set(differences(measured, "threads", "ours-ar", "likelihood")) == set(ASKED)


def test_repeats_are_paired_and_count_as_one_question():
    measured = {"ours-ar": answers(repeats=2), "threads": answers(repeats=2)}
    measured["threads"]["q0", 0]["checks"], measured["threads"]["q0", 1]["checks"] = 1.0, 0.7
    measured["threads"]["q1", 1]["checks"] = None
    found = differences(measured, "threads", "ours-ar", "checks")
    assert found["q0"] == pytest.approx((0.5 + 0.2) / 2) and found["q1"] == 0 and len(found) == 6
    assert compared(measured, "threads", "ours-ar")["checks"]["questions"] == 6


def test_what_decides_is_settled_and_what_cannot_be_said_is_none():
    measured = {name: answers() for name in ("base", "ours-ar", "threads", "lists")}
    rows = verdict(measured, ASKED, [])
    assert {(row["ours"], row["theirs"]) for row in rows if row["decides"]} == {
        ("threads", "ours-ar"),
        ("ours-ar", "base"),
    }
    assert {(row["ours"], row["theirs"]) for row in rows if not row["decides"]} == {
        ("threads", "base"),
        ("lists", "base"),
    }
    for row in rows:
        assert (row["reached"] is None) == (row["metric"] == "checks") == (row["questions"] == 0)
    assert verdict({"base": answers(), "lists": answers()}, ASKED, ASKED)[0]["ours"] == "lists"


def test_means_are_over_answers_that_have_the_figure():
    found = means([{"ended": 1.0, "chrf": None}, {"ended": 0.0, "chrf": 30.0}])
    assert found["ended"] == 0.5 and found["chrf"] == 30.0 and found["rouge_l"] is None
    assert set(found) == {metric.name for metric in METRICS}
