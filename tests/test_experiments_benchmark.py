"""experiments.benchmark: all libraries compute the same, the counts are right, and wrong results are not timed."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import jaxsoft
from experiments._door import InputError
from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import measure as measuring
from experiments.benchmark import peers, places
from experiments.benchmark.__main__ import Config, run
from experiments.benchmark.cases import SUITES, Case
from experiments.benchmark.measure import (
    COLUMNS,
    KEY,
    Ceilings,
    measure,
    measure_ceilings,
    obstacle,
    prepare,
    relative_error,
)
from experiments.benchmark.peers import Peer, missing, peers_of
from experiments.benchmark.places import HUGE, KEPT, PURE, open_places, unused
from experiments.benchmark.report import fallen_ratios, summary, timed_others
from experiments.benchmark.sweep import CLIFFS, TASKS, sweep

pytestmark = [pytest.mark.scripts, pytest.mark.x32]

CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e11})
TWO = "softmax (150, 3)"  # also part of log_softmax's name
COMPILATIONS = measuring.COMPILATIONS


def shrunk(case):
    """The case at a size where no two axes are equal."""
    return dataclasses.replace(case, shape={2: (6, 5), 3: (6, 4, 7), 4: (2, 3, 4, 5)}[len(case.shape)])


DISTINCT = {shrunk(case) for case in SUITES["full"] if not case.is_training}
# What differs in half precision differs in dense cases already.
SHRUNK = sorted((c for c in DISTINCT if c.dtype == "float32" or len(c.shape) == 2), key=lambda case: case.label)
SHRUNK += [Case(task, (6, 1, 4, 7), "bfloat16", axis, swept=True) for task in TASKS for axis in (-1, 2)]


def with_one_of_each_kind(cases):
    """The cases; a case is exhaustive if an earlier one has its task, options, layout and dtype."""
    seen = set()
    for case in sorted(cases, key=lambda case: (-case.axis, -len(case.shape), case.label)):
        layout = case.is_linear or case.is_loss, case.axis, case.swept, len(case.shape) > 2
        kinds = {case.task, (case.ignored, case.smooth), layout, (case.is_loss, case.dtype, case.swept)}
        yield pytest.param(case, id=case.label, marks=() if kinds - seen else pytest.mark.exhaustive)
        seen |= kinds


def rows_of(case, **options):
    rows = measure(case, CEILINGS, 1e-9, np.random.default_rng(0))
    return {row["implementation"]: row for row in rows}


@pytest.fixture(scope="module", autouse=True)
def few_calls():
    """One compilation, one call per turn, few rounds and given ceilings, because times do not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "TURN", 1e-9)
        patch.setattr(measuring, "FEWEST", 2)
        patch.setattr(measuring, "COMPILATIONS", 1)
        patch.setattr(benchmark, "measure_ceilings", lambda dtypes: CEILINGS)
        patch.setattr(benchmark, "unused", lambda: dict.fromkeys((PURE, HUGE, KEPT), "not of interest"))
        yield


@pytest.fixture(scope="module")
def whole(few_calls, tmp_path_factory):
    """A run on two cases."""
    out = tmp_path_factory.mktemp("whole")
    return run(Config(only=TWO, seconds=0.01, out=out)), out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "copy")


# Peers.


@pytest.mark.parametrize("case", [*with_one_of_each_kind(SHRUNK)])
def test_every_installed_library_computes_the_same_as_jaxsoft(case):
    rows = rows_of(case)
    not_timed = {name: row["not timed"] for name, row in rows.items() if "not timed" in row}
    # tokamax counts what it pads so small a vocabulary with, and has to be found out.
    wrong = {"tokamax, chunked"} & rows.keys() if case.is_linear else set()
    assert not_timed.keys() == wrong
    assert all(reason.startswith("differs from ours") for reason in not_timed.values())
    expected = (
        {"jaxsoft", "jax.nn"} if not case.is_loss else {"jaxsoft", "optax, full logits" if case.is_linear else "optax"}
    )
    if case.base == "logsumexp" or case.task == "softmax + VJP":
        expected |= {"formula"}
    if case.axis == 1:
        expected |= {
            f"{name}, {layout}"
            for name in expected - {"jaxsoft", "formula"}
            for layout in ("transposed inside", "data class-last")
        }
    if case.swept:
        extra = {"optax in float32", "jax.nn.log_softmax"} if case.is_loss else set()
        assert expected <= rows.keys() <= expected | extra
        return
    if importlib.util.find_spec("torch"):
        expected |= {"PyTorch"}
    assert expected <= rows.keys()


def test_the_iris_loops_descend_alike():
    assert not [row for row in rows_of(Case("Iris, 1000 steps", (105, 4))).values() if "not timed" in row]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda z, axis: 1.001 * jaxsoft.softmax(z, axis), "differs from ours by 1.0e-03"),
        (lambda z, axis: z * jnp.nan, "differs from ours by nan"),
        (lambda z, axis: z.no_such_method(), "no_such_method"),
    ],
)
def test_a_library_with_wrong_results_is_named_and_not_timed(monkeypatch, broken, said):
    monkeypatch.setattr(jax.nn, "softmax", broken)
    rows = rows_of(Case("softmax", (6, 5)))
    assert said in rows["jax.nn"]["not timed"]
    assert "ratio" not in rows["jax.nn"]
    assert rows["jaxsoft"]["ratio"] == 1


def test_an_error_in_jaxsoft_is_raised(monkeypatch):
    monkeypatch.setattr(jaxsoft, "softmax", lambda z, axis: z.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        rows_of(Case("softmax", (6, 5)))


def test_libraries_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert {**missing()}.keys() == peers.PACKAGES.keys()
    assert [peer.name for peer in peers_of(Case("softmax", (6, 5)))] == ["jaxsoft", "jax.nn"]


# Counts and times.


def test_the_bytes_read_and_written_are_counted():
    """Each input once, each output once: 30 logits, 6 labels and a loss, of 4 bytes or 2."""
    expected = {
        Case("softmax", (6, 5)): (60 * 4, 5 * 30),
        Case("softmax + VJP", (6, 5), "bfloat16"): (120 * 2, 9 * 30),
        Case("cross-entropy", (6, 5)): ((30 + 6 + 1) * 4, 4 * 30),
        Case("cross-entropy + gradient", (6, 5), "bfloat16"): (60 * 2 + (6 + 1) * 4, 6 * 30),
    }
    for case, (moved, flops) in expected.items():
        for row in rows_of(case).values():
            assert row["MB"] == pytest.approx(moved / 1e6)
            assert row["GFLOP"] == pytest.approx(flops / 1e9)
            assert row["GB/s"] == pytest.approx(row["MB"] / row["median ms"])
            assert row["TFLOP/s"] == pytest.approx(row["GFLOP"] / row["median ms"])
            assert row["of ceiling"] == pytest.approx(row["GB/s"] / 10)


def test_labels_are_ignored_in_the_share_stated():
    _, labels = jax.jit(Case("cross-entropy", (100_000, 3), ignored=True).draw)(jax.random.key(0))
    assert np.mean(labels == -100) == pytest.approx(0.05, abs=0.005)
    assert set(np.unique(labels)) == {-100, 0, 1, 2}


def test_temporary_memory_is_of_the_compiled_call():
    """An array of 4 MB that is summed along both axes must be stored."""
    x = jnp.ones((1000, 1000))
    _, _, said = prepare(Peer("", lambda x: jnp.sort(x, 0)[::2].sum() + jnp.sort(x, 1)[:, ::2].sum()), [(x,)])
    assert said["temporaries MB"] >= 4


def test_compiling_is_timed_from_the_function_on_and_the_faster_time_counts(monkeypatch):
    """Two compilations, of programs traced anew, with clocks of 5 and 2 seconds."""
    monkeypatch.setattr(measuring, "COMPILATIONS", COMPILATIONS)
    clock, traced = iter([0.0, 5.0, 10.0, 12.0]), []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    _, said = measuring.compile_ahead(lambda x: traced.append(x) or x + 1, (jnp.ones(3),))
    assert said["compile ms"] == 2000
    assert len(traced) == 2


@pytest.mark.parametrize(("calls", "made"), [(1, 1), (3, 4)])
def test_a_turn_of_several_calls_begins_with_one_that_is_not_timed(monkeypatch, calls, made):
    counted = []
    monkeypatch.setitem(measuring._timers, "peer", (lambda: counted.append(1), lambda result: result))
    assert measuring.turn("peer", calls) > 0
    assert len(counted) == made


def test_on_a_gpu_inputs_take_turns_and_calls_are_queued(monkeypatch):
    _, call, _ = prepare(Peer("", lambda x: x + 1), [(jnp.array(n),) for n in (1, 2)])
    assert [int(call()) for _ in range(3)] == [2, 3, 2]
    counted = []
    monkeypatch.setattr(Case, "size", 2**27)  # two sets of this size fit into no cache
    monkeypatch.setattr(measuring, "TURN", 1e-2)
    monkeypatch.setattr(measuring, "on_gpu", lambda: True)
    monkeypatch.setattr(measuring, "timed", lambda call, wait, calls=1: counted.append(calls) or 1e-3)
    rows_of(Case("softmax", (6, 5)))
    assert set(counted) == {1, 10}


@pytest.mark.parametrize(("gpu", "expected"), [(False, [0, 1, 2, 2]), (True, [2])])
def test_each_result_is_waited_for_but_on_a_gpu_only_the_last(monkeypatch, gpu, expected):
    monkeypatch.setattr(measuring, "on_gpu", lambda: gpu)
    results, waited = iter(range(3)), []
    measuring.timed(lambda: next(results), lambda result: waited.append(result) or result, 3)
    assert waited == expected


def test_ceilings_count_what_is_moved_and_multiplied(monkeypatch):
    """In one millisecond each: 2²⁶ floats read and written, and 2048³ multiplications and additions."""
    monkeypatch.setattr(measuring, "fastest", lambda call: 1e-3 if jax.eval_shape(call).size else 0)
    ceilings = measure_ceilings(["float32", "bfloat16"])
    assert ceilings.copy == pytest.approx(2 * 2**26 * 4 * 1e3)
    assert ceilings.gemm == pytest.approx({"float32": 2 * 2048**3 * 1e3, "bfloat16": 2 * 2048**3 * 1e3})


def test_the_fastest_of_ten_is_taken(monkeypatch):
    times = iter([3.0, 5.0, 2.0, *range(3, 10)])
    monkeypatch.setattr(measuring, "timed", lambda call, wait, calls: next(times))
    assert measuring.fastest(None) == 2


def test_libraries_with_other_data_or_without_times_do_not_count():
    rows = [("a", "jaxsoft", 1), ("a", "p", 3), ("a", "q", 2), ("a", "r, data class-last", 1.5), ("b", "p", np.nan)]
    rows += [("a", "jaxsoft (pure)", 2), ("a", "jaxsoft, huge pages", 1), ("a", "p, huge pages", 2)]
    rows += [("a", "r, data class-last, huge pages", 1), ("a", "q, memory kept", 2), ("a", "jaxsoft, memory kept", 1)]
    table = pd.DataFrame(
        [{"case": case, "shape": "", "dtype": "", "implementation": name, "ratio": ratio} for case, name, ratio in rows]
    )
    assert timed_others(table)["implementation"].tolist() == ["p", "q"]
    assert timed_others(table, HUGE)["implementation"].tolist() == ["p, huge pages"]
    assert timed_others(table, KEPT)["implementation"].tolist() == ["q, memory kept"]


def test_relative_error_is_of_the_largest_entry():
    assert relative_error(jnp.array([1.0, 4.2]), jnp.array([1.1, 4.0])) == pytest.approx(0.05)


def test_cases_that_do_not_fit_are_left_out_with_a_reason():
    case = Case("softmax", (2**20, 2**20))
    assert re.fullmatch(r"needs about 30786 GB, more than 3/4 of \d+ GB", obstacle(case, CEILINGS))
    head = Case("linear cross-entropy", (100, 100, 100))
    assert obstacle(head, Ceilings(1e10, {"float32": 1e4})) == "a call takes at least 200 s"
    assert not obstacle(head, CEILINGS)


def test_each_place_holds_the_inputs():
    case = Case("softmax", (2**20, 2**20))
    assert obstacle(case, CEILINGS, 3).startswith("needs about 39582 GB")  # 2 · 2⁴² bytes more


# Places.


def test_places_are_processes_whose_environment_differs(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # as in this process
    with open_places(["", PURE, HUGE, KEPT]) as opened:
        assert len({ask(os.getpid) for ask in opened.values()} | {os.getpid()}) == 5
        seen = {suffix: ask(os.getenv, "GLIBC_TUNABLES") for suffix, ask in opened.items()}
        assert seen == {
            "": os.getenv("GLIBC_TUNABLES"),
            PURE: os.getenv("GLIBC_TUNABLES"),
            HUGE: "glibc.malloc.hugetlb=1",
            KEPT: os.getenv("GLIBC_TUNABLES"),
        }
        assert opened[KEPT](os.getenv, "MALLOC_TRIM_THRESHOLD_") == "17179869184"
        assert opened[""](jaxsoft.native_kernels) == jaxsoft.native_kernels()
        assert opened[PURE](jaxsoft.native_kernels).detail == "turned off by JAXSOFT_NATIVE=0"
        with pytest.raises(TypeError):
            opened[HUGE](len, 1)
        case = Case("softmax", (6, 5), swept=True)
        rows = {row["implementation"]: row for row in measure(case, CEILINGS, 1e-9, np.random.default_rng(0), opened)}
    assert [*rows] == [
        "jaxsoft", "jax.nn", "jaxsoft (pure)", "jaxsoft, huge pages", "jax.nn, huge pages",
        "jaxsoft, memory kept", "jax.nn, memory kept",
    ]  # fmt: skip
    assert all(row["median ms"] > 0 and row["compile ms"] > 0 for row in rows.values())
    assert rows["jaxsoft"]["ratio"] == rows["jaxsoft"]["compile ratio"] == 1


def test_one_place_is_this_process():
    with open_places([""]) as opened:
        assert opened[""](os.getpid) == os.getpid()


def test_places_without_a_meaning_on_this_machine_are_named(monkeypatch, tmp_path):
    pages = tmp_path / "enabled"
    pages.write_text("always [madvise] never\n")
    monkeypatch.setattr(places, "PAGES", pages)
    monkeypatch.setattr(places, "native_kernels", lambda: jaxsoft.NativeKernels(True, "file"))
    monkeypatch.setattr(places.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert unused() == {}
    monkeypatch.setattr(places, "native_kernels", lambda: jaxsoft.NativeKernels(False, "why"))
    assert unused().keys() == {PURE}
    for library, places_left_out in ((("glibc", "2.34"), {PURE, HUGE}), (("", ""), {PURE, HUGE, KEPT})):
        monkeypatch.setattr(places.platform, "libc_ver", lambda library=library: library)
        assert unused().keys() == places_left_out
        assert unused()[HUGE].startswith("needs glibc 2.35, got ")
    pages.write_text("always madvise [never]\n")
    assert unused()[HUGE].startswith("Linux has turned them off")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert unused() == dict.fromkeys((PURE, HUGE, KEPT), "for a CPU")


# The sweep.


def test_a_sweep_is_drawn_from_its_seed_after_the_cliffs():
    cases = sweep(150, 0)
    assert cases[:11] == CLIFFS
    assert cases == sweep(150, 0)
    assert cases[:31] == sweep(20, 0)
    assert cases[11:] != sweep(150, 1)[11:]
    assert len({case.label for case in cases}) == 161
    drawn = cases[11:]
    assert {case.task for case in drawn} == set(TASKS)
    assert {case.dtype for case in drawn} == {"float32", "bfloat16"}
    assert {0, 1, 2, -1} <= {case.axis for case in drawn}
    assert any(1 in case.shape for case in drawn)
    for case in drawn:
        classes = case.shape[case.axis]
        assert 2 <= classes <= 300_000
        assert 1 <= math.prod(case.shape) // classes <= 1_000_000
        assert math.prod(case.shape) <= 2e7


def test_a_sweep_is_run_like_a_suite(tmp_path):
    table = run(Config(sweep=1, only=CLIFFS[-1].label, seconds=0.01, out=tmp_path))
    assert set(table["shape"]) == {"(2, 36121)"}
    command = json.loads((tmp_path / "about.json").read_text())["command"]
    assert command.endswith(" --sweep 1 --only 'cross-entropy, axis 0 (2, 36121) float32' --seconds 0.01")


# Results.


def test_the_summary_compares_the_fastest_and_lists_what_is_below_one():
    rows = [
        ("a", "jaxsoft", 1, 1), ("a", "jaxsoft (pure)", 2, 3), ("a", "jaxsoft, huge pages", 0.5, 1),
        ("a", "p", 4, 2), ("a", "q", 3, 0.5), ("a", "p, huge pages", 0.4, 1), ("a", "NumPy", 0.1, np.nan),
        ("a", "jaxsoft, memory kept", 2, 1), ("a", "NumPy, memory kept", 1, 1), ("a", "q, memory kept", 5, 1),
        ("b", "jaxsoft", 1, 1), ("b", "p", 12, 2), ("b", "q, data class-last", 0.1, 1),
    ]  # fmt: skip
    text = "\n".join(summary(pd.DataFrame(
        [dict(zip([*KEY, "ratio", "compile ratio"], (case, "(2, 3)", "float32", *row), strict=True)) for case, *row in rows]
    )))  # fmt: skip
    for line in (
        "| others / jaxsoft, as they come | 6.00 | 2 | 0 | 0 | 3.00 | a (2, 3) float32 | 12.00 |",
        "| others / jaxsoft, with huge pages | 0.80 | 1 | 1 | 1 | 0.80 | a (2, 3) float32 | 0.80 |",
        "| others / jaxsoft, memory kept | 2.50 | 1 | 0 | 0 | 2.50 | a (2, 3) float32 | 2.50 |",
        "| others / jaxsoft without kernels | 1.50 | 1 | 0 | 0 | 1.50 | a (2, 3) float32 | 1.50 |",
        "| jaxsoft without kernels / jaxsoft | 2.00 | 1 | 0 | 0 | 2.00 | a (2, 3) float32 | 2.00 |",
        "| compiling, others / jaxsoft | 1.00 | 2 | 1 | 1 | 0.50 | a (2, 3) float32 | 2.00 |",
        "| a | (2, 3) | float32 | 3 q | 0.8 p | 2.5 q |",
    ):
        assert line in text.splitlines()
    assert "| b |" not in text


def test_table_summary_and_pictures_are_written(whole):
    table, out = whole
    assert {path.name for path in out.iterdir()} == {
        "about.json", "ratios.png", "results.csv", "results.md", "roofline.png"
    }  # fmt: skip
    pd.testing.assert_frame_equal(pd.read_csv(out / "results.csv"), table, check_dtype=False)
    assert list(table) == COLUMNS
    assert set(table["case"]) == {"softmax", "log_softmax"}
    assert all(table["ratio"].between(table["ratio low"], table["ratio high"]))
    about, text = json.loads((out / "about.json").read_text()), (out / "results.md").read_text()
    for said in (about["date"], about["command"], about["device"], about["kernels"], "GB/s, matrix product"):
        assert text.count(said) == 1
    assert jax.__version__ in text
    assert "- implementations (pure): not of interest" in text
    waiting = f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}"
    assert about["command"] == f"{waiting} python -m experiments.benchmark --only '{TWO}' --seconds 0.01"
    written = text.partition("\n| case | shape | dtype | implementation |")[2]
    assert written.count("\n| softmax | (150, 3) | float32 | ") == len(table) / 2


@pytest.mark.parametrize(("load", "warned"), [(0.4, False), (0.6, True)])
def test_a_busy_machine_is_warned_of(monkeypatch, capsys, tmp_path, load, warned):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    run(Config(only=TWO, seconds=0.01, out=tmp_path))
    output = capsys.readouterr().out
    assert f"Load average of the minute before: {load:.2f}." in output
    assert output.startswith(f"Warning: the load average is {load:.2f}.") == warned


def test_a_killed_run_goes_on_after_the_cases_it_has(whole, copy):
    """The first case is left as it is, the second one timed again."""
    results = copy / "results.csv"
    table = pd.read_csv(results)
    first = table["case"] == table["case"][0]
    table.loc[first].assign(**{"median ms": 123.0}).to_csv(results, index=False)
    resumed = run(Config(only=TWO, seconds=0.01, out=copy, resume=True))
    assert (resumed["median ms"] == 123).tolist() == first.tolist()
    pd.testing.assert_frame_equal(resumed[KEY], whole[0][KEY])
    with pytest.raises(InputError, match=re.escape("--resume: ") + ".*expected command .*--seconds 0.02 as here"):
        run(Config(only=TWO, seconds=0.02, out=copy, resume=True))


def test_ratios_that_fell_are_flagged(copy, tmp_path):
    old = pd.read_csv(copy / "results.csv")
    theirs = (old["case"] == "softmax") & (old["implementation"] == "jax.nn")
    old.loc[theirs, "ratio"] *= 2
    old.to_csv(tmp_path / "old.csv", index=False)
    run(Config(only=TWO, seconds=0.01, out=copy, resume=True, compare=tmp_path / "old.csv"))
    text = (copy / "results.md").read_text()
    assert "1 ratios have fallen by more than 10%" in text
    assert re.search(r"\n- softmax \(150, 3\) float32 jax\.nn: \*\*[\d.]+ to [\d.]+\*\*\n", text)


def test_a_tenth_is_the_limit():
    old = pd.DataFrame([(*"abcd", 1.0), (*"abce", 2.0), (*"abcf", 1.0)], columns=[*KEY, "ratio"])
    new = pd.DataFrame([(*"abcd", 0.91), (*"abce", 1.79), (*"abcg", 0.1)], columns=[*KEY, "ratio"])
    assert fallen_ratios(new, old)["implementation"].tolist() == ["e"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "--seconds: expected a positive number, got 0"),
        ({"seconds": math.inf}, "--seconds: expected a positive number, got inf"),
        ({"sweep": -1}, "--sweep: expected a number of cases, got -1"),
        ({"seed": -1}, "--seed: expected an integer in [0, 2**32), got -1"),
        ({"only": "sparsemax"}, "--only: expected part of one of ['Iris, 1000 steps', "),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        run(Config(out=tmp_path, **options))


@pytest.mark.parametrize("content", ["", "case,shape\nsoftmax,3\n", "\0\n1,2\n3,4,5\n"])
def test_a_file_that_is_not_a_table_is_refused(tmp_path, content):
    (tmp_path / "old.csv").write_text(content)
    with pytest.raises(InputError, match=r"old\.csv: expected a results\.csv of this benchmark, got "):
        run(Config(only=TWO, compare=tmp_path / "old.csv", out=tmp_path))
