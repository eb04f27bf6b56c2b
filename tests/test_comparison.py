"""Comparisons: every wrong word is named, step sizes are chosen on validation data, and the statistics are right."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qgm_ext import topology
from qgm_ext.algorithms import base
from qgm_ext.experiments import results, tables
from qgm_ext.experiments.comparison import Comparison, run_name
from qgm_ext.experiments.comparison_files import from_dict, merge, preset, preset_names, read
from qgm_ext.experiments.results import Results, Run, paired_test

PLAIN = {"algorithms": ["dsgd", "qg_dsgdm_n"], "topologies": ["ring:4"], "lrs": [0.1, 0.2], "seeds": 2}


FIGURE = {"method": "dsgd", "topology": "ring:4", "alpha": 0.1, "value": 70}


def plan(**changes) -> Comparison:
    return from_dict({**PLAIN, **changes})


# The plan -------------------------------------------------------------------------------------------------------------


def test_a_grid_has_all_its_cells_and_runs():
    made = plan(topologies=["ring:4", "chain:3"], alphas=[0.1, 10], models=["mlp", "cnn"])
    assert len(list(made.cells())) == 2 * 2 * 2 * 2
    runs = list(results.planned_runs(made, Path("x")))
    assert len(runs) == 16 * 2 * 2
    assert len({run.folder for run in runs}) == len(runs)
    assert {(run.config.topology, run.config.workers) for run in runs} == {("ring", 4), ("chain", 3)}
    assert all(run.config.validation == 0.1 and run.config.threads == 1 for run in runs)


def test_hyper_parameters_go_where_they_exist_and_a_method_has_the_last_word():
    made = plan(
        algorithms=["dsgd"],
        hyper={"momentum": 0.5, "weight_decay": 0.25},
        method=[{"algorithm": "qg_dsgdm_n", "hyper": {"momentum": 0.3}, "train": {"clip": 2.0}, "lrs": [3.0]}],
    )
    dsgd, qg = (made.config(cell, cell.method.lrs[0], 0) for cell in made.cells())
    assert dict(dsgd.hyper) == {"weight_decay": 0.25}
    assert (qg.hyper["momentum"], qg.hyper["weight_decay"], qg.clip, qg.lr) == (0.3, 0.25, 2.0, 3.0)
    assert dsgd.clip is None


def test_without_a_grid_step_sizes_lie_around_the_usual_one():
    made = from_dict({"algorithms": ["dsgd"]})
    assert made.methods[0].lrs == (0.025, 0.05, 0.1, 0.2)
    assert (made.topologies, made.seeds, made.alphas) == ((("ring", 16),), (0, 1, 2), (0.1,))


def test_a_plan_survives_its_file():
    made = plan(
        method=[{"algorithm": "relaysgd", "label": "R", "topology": "chain", "hyper": {"momentum": 0.5}}],
        published=[{"method": "dsgd", "topology": "ring:4", "alpha": 0.1, "value": 70, "verified": False}],
        baseline="R",
        train={"epochs": 3, "batch": 4},
    )
    assert from_dict(made.as_dict()) == made


def test_methods_that_need_a_tree_get_one_and_the_notes_say_which():
    made = plan(algorithms=["dsgd", "relaysgd"])
    *_, cell = made.cells()
    config = made.config(cell, 0.1, 0)
    assert config.topology == "spanning_tree_of_ring"
    assert topology.get(config.topology, 4) == topology.spanning_tree(topology.ring(4))
    assert made.notes() == ["relaysgd needs a tree: on ring it runs on spanning_tree_of_ring"]
    assert plan(algorithms=["relaysgd"], topologies=["chain:4"]).notes() == []


def test_centralised_methods_share_their_runs_between_topologies():
    made = plan(algorithms=["csgd"], topologies=["ring:4", "chain:4"])
    runs = list(results.planned_runs(made, Path("x")))
    assert len(runs) == 2 * len({run.folder for run in runs})


def test_the_folder_of_a_run_depends_on_what_decides_its_outcome_alone():
    made = plan()
    cell = next(made.cells())
    config = made.config(cell, 0.1, 0)
    assert run_name(config) == run_name(dataclasses.replace(config, threads=3))
    others = [{"seed": 1}, {"lr": 0.3}, {"alpha": 0.2}, {"batch": 3}, {"hyper": {"weight_decay": 0.1}}]
    names = {run_name(dataclasses.replace(config, **{"warmup_from": 0.0, **other})) for other in others}
    assert len(names) == len(others)
    assert run_name(config) not in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": ["dsgd"]}, "has no key 'algorithm', did you mean 'algorithms'"),
        ({"algorithms": ["qg_dsgdmn"]}, "did you mean 'qg_dsgdm_n'"),
        ({"algorithms": "dsgd"}, "algorithms must be a list of strings, got 'dsgd'"),
        ({"algorithms": []}, "needs algorithms or"),
        ({"algorithms": ["dsgd", "dsgd"]}, "two methods have the label 'dsgd'"),
        ({"topologies": ["rnig:4"]}, "did you mean 'ring'"),
        ({"topologies": ["ring:x"]}, "topologies must be NAME or NAME:WORKERS"),
        ({"topologies": ["hypercube:12"]}, "power of two"),
        ({"topologies": ["ring:4", "ring:4"]}, "topologies holds something twice"),
        ({"models": ["mpl"]}, "did you mean 'mlp'"),
        ({"alphas": [0]}, "alpha must be a finite number > 0"),
        ({"alphas": [True]}, "alphas must be a list of numbers"),
        ({"seeds": 0}, "seeds must be a number of at least 1"),
        ({"seeds": [0, 0]}, "seeds holds something twice"),
        ({"seeds": [-1]}, "seed must be in"),
        ({"lrs": [0.1, 0.1]}, "lrs of dsgd holds something twice"),
        ({"lrs": [-0.1]}, "lrs must be a finite number"),
        ({"lrs": []}, "lrs must not be empty"),
        ({"method": [{"algorithm": "d2", "lrs": []}]}, "lrs of method d2 must not be empty"),
        ({"lrs": 0.1}, "lrs must be a list of numbers"),
        ({"baseline": "dsgdm"}, "baseline must be one of dsgd, qg_dsgdm_n"),
        ({"lr_seeds": "one"}, "lr_seeds must be one of all, first"),
        ({"choose": "test"}, "choose must be one of last, best"),
        ({"metric": "min"}, "metric must be one of mean, worst"),
        ({"train": {"epohcs": 3}}, r"\[train\] has no key 'epohcs', did you mean 'epochs'"),
        ({"train": {"lr": 0.1}}, r"\[train\] can't set lr: it is decided by lrs"),
        ({"train": {"data": "digit"}}, "did you mean 'digits'"),
        ({"train": {"validation": 0}}, "they are chosen on a validation set: validation must be > 0"),
        ({"train": {"epochs": 0}}, "dsgd on ring:4, alpha 0.1, mlp: epochs must be at least 1"),
        ({"train": 3}, "train must be a table"),
        ({"train": {"partition": "iid"}, "alphas": [1, 2]}, "alphas belong to the dirichlet partition"),
        (
            {"hyper": {"momentun": 0.9}},
            "none of the algorithms has a hyper-parameter of this name, did you mean 'momentum'",
        ),
        ({"seeds": 20261129}, r"seeds is how many there are, at most 1000, .* one seed is \[20261129\]"),
        ({"hyper": {"momentum": 1.0}}, r"momentum must be in \[0, 1\)"),
        ({"method": [{"label": "x"}]}, "a method needs an algorithm"),
        ({"method": [{"algorithm": "d2", "lr": 1}]}, "a method has no key 'lr', did you mean 'lrs'"),
        ({"method": {"algorithm": "d2"}}, "method must be a list of tables"),
        ({"method": [{"algorithm": "d2", "topology": "rnig"}]}, "did you mean 'ring'"),
        ({"method": [{"algorithm": "d2", "hyper": 3}]}, "hyper of method d2 must be a table"),
        ({"published": [{"method": "x"}]}, "a published figure needs a value"),
        ({"published": [{"method": "x", "value": "1", "topology": "ring:4"}]}, "value of a published figure must be"),
        ({"published": [{"method": "x", "value": math.nan, "topology": "ring:4"}]}, "must be a finite number, got nan"),
        ({"published": [{"method": "x", "value": 1, "topology": "ring:4", "source": 3}]}, "source of a published fig"),
        ({"published": [{"method": "x", "value": 1, "topology": "ring:4", "verified": "no"}]}, "must be true or false"),
        ({"published": [FIGURE | {"topology": "ring:8"}]}, "topology of the published figure 70 .* got 'ring:8'"),
        ({"published": [FIGURE | {"alpha": 0.3}]}, "alpha of the published figure 70 .* must be one of 0.1, got 0.3"),
        ({"published": [FIGURE | {"model": "cnn"}]}, "model of the published figure 70 .* must be one of mlp, got"),
        (
            {"published": [FIGURE | {"method": "QG-DSGDm-N"}]},
            "is no label .*; did you mean 'qg_dsgdm_n'",
        ),
        ({"published": [FIGURE], "train": {"partition": "iid"}}, "must be left out: partition 'iid' has none"),
        ({"plugins": ["no_such_module"]}, "plugin no_such_module can't be imported: ModuleNotFoundError"),
        ({"plugins": ["/nowhere/a.py"]}, "plugin /nowhere/a.py can't be imported"),
        ({"algorithms": ["relaysgd"], "topologies": ["exponential:8"]}, "give the method a topology of its own"),
        ({"algorithms": ["dsgd"], "topologies": ["random_directed:8"]}, "needs a doubly stochastic mixing matrix"),
        ({"title": 3}, "title must be a string"),
    ],
)
def test_wrong_words_are_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan(**changes)


def test_a_file_is_read_and_its_mistakes_are_told_with_its_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('algorithms = ["dsgd"]\nlrs = [0.1]\n[train]\nepochs = 2\n')
    made = read(path, train={"batch": 4}, alphas=[3.0])
    assert (made.train["epochs"], made.train["batch"], made.alphas) == (2, 4, (3.0,))
    for content, message in (
        ('algorithms = ["dsgd"\nx = 1\n', r"mine\.toml is not TOML: .*line"),
        ('algorithms = ["dsdg"]\n', r"mine\.toml: algorithm 'dsdg' is not known"),
        (b"\xff\xfe", r"mine\.toml is not TOML"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            read(path)
    path.write_bytes(b"\xef\xbb\xbf" + b'algorithms = ["dsgd"]\n')  # the mark that some editors set
    assert read(path).methods[0].algorithm == "dsgd"
    path.with_name("exits.py").write_text("import sys\nsys.exit(3)\n")
    path.write_text('plugins = ["exits.py"]\nalgorithms = ["dsgd"]\n')
    with pytest.raises(ValueError, match=r"exits\.py can't be imported: SystemExit: 3"):
        read(path)
    with pytest.raises(OSError, match="No such file"):
        read(tmp_path / "nowhere.toml")


def test_options_replace_what_a_file_says_but_keep_what_it_says_of_a_method():
    raw = {
        "baseline": "B",
        "method": [{"algorithm": "dsgd", "label": "A", "lrs": [1.0]}, {"algorithm": "dsgdm", "label": "B"}],
    }
    made = from_dict(merge(raw, {"algorithms": ["dsgd", "d2"], "lrs": [0.5]}))
    assert {method.label: method.lrs for method in made.methods} == {"A": (0.5,), "d2": (0.5,)}
    assert from_dict(merge(raw, {"algorithms": ["dsgd"]})).methods[0].lrs == (1.0,)


def test_published_figures_of_what_options_leave_out_are_left_out():
    raw = {
        **PLAIN,
        "topologies": ["ring:4", "chain:4"],
        "alphas": [0.1, 10],
        "published": [
            FIGURE,
            FIGURE | {"alpha": 10, "value": 80},
            FIGURE | {"topology": "chain:4", "value": 60},
            FIGURE | {"method": "qg_dsgdm_n", "value": 75},
            FIGURE | {"method": "only in a paper", "value": 90},
        ],
    }

    def values(**changes):
        return [figure.value for figure in from_dict(merge(raw, changes)).published]

    assert values() == values(lrs=[0.3]) == [70, 80, 60, 75, 90]
    assert values(alphas=[10.0]) == [80]
    assert values(topologies=["Chain:4"]) == [60]
    assert values(algorithms=["qg_dsgdm_n"]) == [75, 90]
    assert values(models=["cnn"]) == [70, 80, 60, 75, 90]  # they are of any model
    raw["published"].append(FIGURE | {"alpha": 0.3})
    for changes in ({}, {"alphas": [10.0]}, {"topologies": ["chain:4"]}):  # a mistake of the file stays one
        with pytest.raises(ValueError, match=r"alpha of the published figure 70 of 'dsgd' must be one of .*, got 0\.3"):
            values(**changes)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"method": [1]}, "method must be a list of tables"),
        ({"train": 3}, "train must be a table, got 3"),
        ({"baseline": ["dsgd"]}, "baseline must be a string"),
    ],
)
def test_wrong_words_of_a_file_are_named_with_options_too(raw, message):
    with pytest.raises(TypeError, match=message):
        from_dict(merge({**PLAIN, **raw}, {"algorithms": ["dsgd"], "train": {"batch": 4}, "lrs": [0.1]}))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_can_be_narrowed_by_options(name):
    whole = preset(name)
    first = whole.topologies[0]
    narrow = preset(name, alphas=whole.alphas[:1], topologies=[f"{first[0]}:{first[1]}"])
    shown = [figure for figure in whole.published if figure.topology == f"{first[0]}:{first[1]}"]
    assert list(narrow.published) == [figure for figure in shown if figure.alpha in (None, whole.alphas[0])]


def test_a_plugin_file_brings_an_algorithm_from_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_registry", dict(base._registry))  # other tests must not see it
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from qgm_ext.algorithms import get_class, register\n"
        "@register\n@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(get_class('dsgd')):\n    name: ClassVar[str] = 'plugin_dsgd'\n"
    )
    path = tmp_path / "mine.toml"
    path.write_text('plugins = ["mine.py"]\nalgorithms = ["plugin_dsgd"]\n')
    made = read(path)
    assert made.methods[0].algorithm == "plugin_dsgd"
    assert made.plugins == (str(tmp_path / "mine.py"),)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_valid_comparison(name):
    made = preset(name)
    assert made.title
    assert len(made.seeds) >= 1


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="did you mean 'paper-small'"):
        preset("paper-smal")


# Results --------------------------------------------------------------------------------------------------------------


def finished(run: Run, validation: float, test: float, before: tuple[float, float] = (0.0, 0.0)) -> Run:
    metrics = tuple(
        {
            **{"step": step, "epoch": float(step), "bytes_sent": 8 * step},
            **{results.VALIDATION["mean"]: v, results.TEST["mean"]: t},
            **{results.VALIDATION["worst"]: 1 - v, results.TEST["worst"]: t / 2},
        }
        for step, (v, t) in enumerate((before, (validation, test)))
    )
    return dataclasses.replace(run, status="finished", metrics=metrics, seconds=1.0)


def made_up(plan_, accuracy) -> Results:
    """Results whose runs give what ``accuracy`` (run -> (validation, test), None: diverged, "todo") says."""
    runs = []
    for run in results.planned_runs(plan_, Path("x")):
        value = accuracy(run)
        if value == "todo":
            runs.append(run)
        elif value is None:
            runs.append(dataclasses.replace(run, status="diverged", reason="nan"))
        else:
            runs.append(finished(run, *value))
    return Results(plan_, Path("x"), runs)


def test_step_sizes_are_chosen_on_validation_whatever_the_test_set_says():
    found = made_up(plan(), lambda run: (0.9, 0.1) if run.lr == 0.2 else (0.5, 0.99))
    for score in found.scores():
        assert (score.lr, score.mean, score.at_edge) == (0.2, pytest.approx(0.1), True)


def test_a_step_size_that_diverges_with_one_seed_is_out():
    found = made_up(plan(), lambda run: (0.5, 0.6) if run.lr == 0.1 else None if run.seed else (0.9, 0.9))
    assert [score.lr for score in found.scores()] == [0.1, 0.1]


def test_where_everything_diverges_the_table_says_so():
    found = made_up(plan(), lambda run: None if run.cell.method.label == "dsgd" else (0.5, 0.5))
    dsgd, qg = found.scores()
    assert (dsgd.lr, dsgd.diverged, dsgd.complete, tables.score_text(dsgd)) == (None, 4, True, "diverged")
    assert qg.against is None


def test_nothing_is_chosen_before_the_search_is_done():
    found = made_up(plan(), lambda run: "todo" if (run.lr, run.seed) == (0.2, 1) else (0.5, 0.5))
    assert [score.lr for score in found.scores()] == [None, None]
    assert not any(score.complete for score in found.scores())


def test_with_the_first_seed_for_the_search_others_run_the_chosen_step_size_only():
    first = plan(lr_seeds="first", seeds=3)

    def accuracy(run):
        return "todo" if run.seed else (run.lr, 0.5)

    found = made_up(first, accuracy)
    cell = next(first.cells())
    assert found.chosen_lr(cell) == 0.2
    assert {(run.lr, run.seed) for run in found.wanted(cell)} == {(0.1, 0), (0.2, 0), (0.2, 1), (0.2, 2)}
    assert (len(found.done()), found.num_wanted()) == (2 * 2, 2 * 4)


def test_runs_that_the_table_does_not_need_do_not_count_as_done():
    first = plan(lr_seeds="first", seeds=3)
    found = made_up(first, lambda run: "todo" if run.seed and run.lr == 0.2 else (run.lr, 0.5))
    assert sum(run.status == "finished" for run in found.runs.values()) == 2 * 4
    assert (len(found.done()), found.num_wanted()) == (2 * 2, 2 * 4)


def test_choose_best_takes_the_test_accuracy_at_the_best_validation_accuracy():
    for choose, expected in (("last", 0.3), ("best", 0.8)):
        found = Results(
            made := plan(choose=choose),
            Path("x"),
            [finished(run, 0.5, 0.3, before=(0.7, 0.8)) for run in results.planned_runs(made, Path("x"))],
        )
        assert [score.mean for score in found.scores()] == pytest.approx([expected, expected])


@pytest.mark.parametrize("through_csv", [False, True])
def test_the_worst_worker_counts_in_the_choice_and_in_the_table_if_the_comparison_says_so(through_csv, tmp_path):
    """In the made-up runs the step size that is good for the mean is bad for the worst worker."""
    for metric, lr, shown in (("mean", 0.2, "80.0"), ("worst", 0.1, "30.0")):
        made = plan(metric=metric, seeds=1, baseline="dsgd")
        found = made_up(made, lambda run: (0.9, 0.8) if run.lr == 0.2 else (0.5, 0.6))
        if through_csv:
            runs = [dataclasses.replace(run, folder=tmp_path / "runs" / run.folder.name) for run in found.runs.values()]
            Results(made, tmp_path, runs).write_csv()
            content = {"format": "qgm_ext.compare/1", "comparison": made.as_dict()}
            (tmp_path / results.COMPARISON).write_text(json.dumps(content))
            found = results.load_csv(tmp_path)
        assert [score.lr for score in found.scores()] == [lr, lr]
        assert [row.cells[0].text for table in tables.make(found) for row in table.rows] == [shown, shown]
        words = {"mean": "mean of the local models at the end", "worst": "of the worst local model at the end"}
        assert words[metric] in tables.legend(found)[0]


def test_choose_best_goes_by_the_metric():
    """At the first of two evaluations the mean is better, at the second the worst worker, on the validation set."""
    for metric, expected in (("mean", 0.6), ("worst", 0.25)):
        made = plan(choose="best", metric=metric)
        runs = [finished(run, 0.3, 0.5, before=(0.7, 0.6)) for run in results.planned_runs(made, Path("x"))]
        assert [score.mean for score in Results(made, Path("x"), runs).scores()] == pytest.approx([expected] * 2)


def test_mean_deviation_and_paired_test_are_those_of_numpy_and_scipy():
    values = {"dsgd": [0.80, 0.83, 0.79], "qg_dsgdm_n": [0.85, 0.84, 0.88]}
    made = plan(seeds=3, lrs=[0.1])
    found = made_up(made, lambda run: (0.5, values[run.cell.method.label][run.seed]))
    dsgd, qg = found.scores()
    ours, theirs = [0.85, 0.84, 0.88], [0.80, 0.83, 0.79]
    assert (qg.mean, qg.std) == (pytest.approx(np.mean(ours)), pytest.approx(np.std(ours, ddof=1)))
    assert dsgd.against is None
    expected = stats.ttest_rel(ours, theirs)
    low, high = expected.confidence_interval(0.95)
    assert qg.against.p == pytest.approx(expected.pvalue)
    assert (qg.against.low, qg.against.high) == (pytest.approx(low), pytest.approx(high))
    assert qg.against.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert qg.against.n == 3


def test_a_paired_test_without_spread_has_no_p_value():
    for test in (paired_test([0.5], [0.4]), paired_test([0.5, 0.6], [0.4, 0.5])):
        assert test.difference == pytest.approx(0.1)
        assert math.isnan(test.p)


def test_the_csv_is_tidy():
    found = made_up(plan(), lambda run: None if run.seed and run.lr == 0.1 else (run.lr, 0.5))
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert len(lines) == 8
    assert {line["status"] for line in lines} == {"finished", "diverged"}
    for line in lines:
        assert line["chosen"] == str(int(line["lr"] == "0.2"))
        assert (line["accuracy_local_mean"] == "0.5") == (line["status"] == "finished")
        assert line["folder"].startswith("runs/mlp-ring4-a0.1-")


def test_the_csv_alone_gives_the_same_scores(tmp_path):
    made = plan(seeds=3)
    found = made_up(made, lambda run: None if run.seed and run.lr == 0.1 else (run.lr, 0.5 + 0.01 * run.seed))
    again = Results(
        made, tmp_path, [dataclasses.replace(r, folder=tmp_path / "runs" / r.folder.name) for r in found.runs.values()]
    )
    again.write_csv()
    content = {"format": "qgm_ext.compare/1", "comparison": made.as_dict()}
    (tmp_path / results.COMPARISON).write_text(json.dumps(content))
    assert results.load_csv(tmp_path).scores() == found.scores()


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_paper():
    made = plan(
        algorithms=["dsgd", "qg_dsgdm_n", "csgd"],
        alphas=[10, 0.1],
        published=[
            {"method": "dsgd", "topology": "ring:4", "alpha": 0.1, "value": 74.55, "std": 2.07},
            {"method": "qg_dsgdm_n", "topology": "ring:4", "value": 90, "verified": False, "note": "one seed"},
            {"method": "D2", "topology": "ring:4", "alpha": 10, "value": 80},
        ],
    )
    levels = {"dsgd": 0.7, "qg_dsgdm_n": 0.8, "csgd": 0.9}
    found = made_up(made, lambda run: (run.lr, levels[run.cell.method.label] + 0.01 * run.seed))
    (table,) = tables.make(found)
    assert table.title == "mlp on digits, ring of 4"
    assert table.heads == ("alpha = 10", "alpha = 0.1")
    assert [row.label for row in table.rows] == ["csgd", "dsgd", "qg_dsgdm_n", "D2"]  # centralised on top
    assert table.rows[2].cells[1].text == "80.5 ± 0.7"
    assert [row.cells[0].best for row in table.rows] == [False, False, True, False]
    assert table.rows[2].cells[0].detail.startswith("lr 0.2*, +10.0")
    assert table.rows[1].cells[1].published == "74.55 ± 2.07"
    assert table.rows[1].cells[0].published == ""
    assert table.rows[2].cells[0].published == "90 (not verified, one seed)"
    assert table.rows[3].cells[0].published == "80"
    text = tables.markdown(table, with_published=True)
    assert "| dsgd | 70.5 ± 0.7 |" in text
    assert "**80.5 ± 0.7**" in text
    assert any("not verified" in line for line in tables.legend(found))


def test_a_folder_without_a_readable_comparison_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no comparison in"):
        results.load(tmp_path)
    (tmp_path / results.COMPARISON).write_text("{")
    with pytest.raises(ValueError, match=r"comparison\.json can't be read"):
        results.load(tmp_path)
    (tmp_path / results.COMPARISON).write_text('{"format": "qgm_ext.compare/9"}')
    with pytest.raises(ValueError, match="is of version 'qgm_ext.compare/9'"):
        results.load(tmp_path)
    for content in ("[]", '{"format": "qgm_ext.compare/1"}'):
        (tmp_path / results.COMPARISON).write_text(content)
        with pytest.raises(ValueError, match=r"comparison\.json can't be read: it holds no comparison"):
            results.load(tmp_path)
