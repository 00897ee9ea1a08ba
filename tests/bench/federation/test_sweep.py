"""The sweep: its jobs, its tables and verdicts from cells that are made up, and one real cell on little text."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lorafleet.bench.federation import child
from lorafleet.bench.federation.arms import NOBODY, NOTHING, attack_arm
from lorafleet.bench.federation.cell import CLUSTERED, Budget
from lorafleet.bench.federation.data import Pools, build_pools, cut
from lorafleet.bench.federation.jobs import Cell, CellChildren, CellJob
from lorafleet.bench.federation.plots import write_plots
from lorafleet.bench.federation.run import Sweep, SweepSettings, attack_job, bench_federation, quality_job
from lorafleet.bench.federation.summary import arm_loss
from lorafleet.cli import main
from lorafleet.errors import InvalidInputError, UnavailableError, UnknownNameError

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
SETS = ("cpp/plain", "sql/plain")


def budget(**changes: Any) -> Budget:
    fields: dict[str, Any] = {
        "ranks": (4, 2, 4, 2, 4), "rounds": 2, "steps": 2, "batch_size": 1, "sequence_length": 32,
        "learning_rate": 1e-2, "expert_rank": 8, "blocks": 8,
    }  # fmt: skip
    return Budget(**{**fields, **changes})


def settings(**changes: Any) -> SweepSettings:
    fields: dict[str, Any] = {
        "splits": ("iid", "dirichlet_0.5"), "rules": ("exact", "fedit"), "attack_splits": ("iid",),
        "wrappers": ("median",), "seeds": 2, "bad": 1, "budget": budget(),
    }  # fmt: skip
    return SweepSettings(**{**fields, **changes})


LOSS = {"base": 4.0, "local": 3.6, "centralised": 3.0, "exact": 3.08, "fedit": 3.2, CLUSTERED: 3.1}


def made_up(job: CellJob, **losses: float) -> Cell:
    """Each arm's loss on both sets, a little more with each seed; attacks cost 0.02, without a wrapper 5."""

    def arm(name: str) -> dict[str, Any]:
        if name in LOSS:
            loss = losses.get(name, LOSS[name])
        else:
            attack, _, wrapper = name.partition(" / ")
            loss = 3.1 + (attack != NOBODY) * (5.0 if wrapper == NOTHING else 0.02)
        loss += 0.01 * job.seed
        labels = ["expert-1", "shared"] if name == CLUSTERED else ["a", "b"] if name == "local" else ["shared"]
        return {
            "losses": {label: dict.fromkeys(SETS, loss) for label in labels},
            "assignment": {"a": labels[0], "b": labels[-1]},
            "curve": [] if name in ("base", "local", "centralised") else [loss + 0.1, loss],
            "seconds": 1.0,
        }

    shares = {"a": {"pieces": {"cpp": 3, "sql": 1}, "style": "plain"}, "b": {"pieces": {"sql": 4}, "style": "plain"}}
    return {"shares": shares, "arms": {name: arm(name) for name in job.arms}}


def sweep(folder: Path, run: Callable[[CellJob], Cell] = made_up, **changes: Any) -> Sweep:
    return bench_federation(
        settings(**changes), work=folder / "work", out=folder / "out", when=NOON, say=lambda _: None,
        run=lambda jobs, done: [run(job) for job in jobs],
    )  # fmt: skip


def test_every_cell_has_its_references_and_attacks_are_compared_with_calm() -> None:
    assert quality_job(settings(), "iid", 1).arms == ("base", "local", "centralised", "exact", "fedit", CLUSTERED)
    attacks = attack_job(settings(), "iid", 1).arms
    assert attacks[0] == attack_arm(NOBODY, NOTHING)
    assert set(attacks[2:]) == {
        attack_arm(attack, wrapper) for attack in ("sign_flip", "scale_100") for wrapper in (NOTHING, "median")
    }


def test_the_record_holds_means_and_spreads_over_seeds_and_the_command_that_gives_them(tmp_path: Path) -> None:
    done = sweep(tmp_path)
    exact = next(r for r in done.quality if (r.split, r.arm) == ("dirichlet_0.5", "exact"))
    assert exact.loss.mean == pytest.approx(3.08 + 0.015)
    assert exact.loss.deviation == pytest.approx(0.01 / 2**0.5)
    assert exact.gap.mean == pytest.approx(0.92)
    record = json.loads(done.file.read_text())[-1]
    assert record["benchmark"] == "federation" and record["shape"]["name"] == "federation-tiny"
    assert "--splits iid,dirichlet_0.5 --rules exact,fedit" in record["command"]
    assert len(record["cells"]) == 2 * 2 + 2
    assert {row["arm"] for row in record["quality"]} == set(LOSS)


def test_verdicts_say_what_was_met_and_what_was_missed(tmp_path: Path) -> None:
    assert all(verdict.met for verdict in sweep(tmp_path).verdicts)
    worse = sweep(tmp_path, lambda job: made_up(job, exact=3.4)).verdicts
    assert [v.met for v in worse if "fedit" in v.figure] == [False, False]
    assert [v.met for v in worse if "gap" in v.figure] == [False]


def test_an_attack_that_gets_through_a_wrapper_is_a_miss(tmp_path: Path) -> None:
    def run(job: CellJob) -> Cell:
        cell = made_up(job)
        for name, arm in cell["arms"].items():
            if name == attack_arm("scale_100", "median"):
                arm["losses"]["shared"] = dict.fromkeys(SETS, 3.5)
        return cell

    missed = [v.figure for v in sweep(tmp_path, run).verdicts if not v.met]
    assert missed == ["iid: scale_100 with median, rise of the loss"]


def test_images_are_written_for_what_there_is(tmp_path: Path) -> None:
    names = {path.name for path in write_plots(sweep(tmp_path), tmp_path / "plots")}
    assert names == {f"federation-{name}.png" for name in ("curves", "gaps", "experts", "attacks")}
    few = sweep(tmp_path, attack_splits=(), rules=("fedit",))
    assert {path.name for path in write_plots(few, tmp_path / "few")} == {
        "federation-curves.png",
        "federation-gaps.png",
    }
    assert all(path.stat().st_size > 5_000 for path in (tmp_path / "plots").iterdir())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="pathological"):
        settings(splits=("even",))
    with pytest.raises(UnknownNameError, match="fedit"):
        settings(rules=("mean",))
    with pytest.raises(UnknownNameError, match="multi_krum"):
        settings(wrappers=("huber",))
    with pytest.raises(InvalidInputError, match="2 bad members of 5"):
        settings(bad=2)


def test_pieces_end_where_lines_do_and_held_out_documents_do_not_train(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(400))
    assert "".join(cut(text)) == text[: sum(map(len, cut(text)))] and all(p.endswith("\n") for p in cut(text))
    pools = build_pools(seed=1)
    assert {*pools.train} == {*pools.held_out} == {"cpp", "math", "prose", "sql"}
    for domain, pieces in pools.held_out.items():
        assert len(pieces) > 20 and not set(pieces) & set(pools.train[domain])
    pools.save(tmp_path / "pools.json")
    assert Pools.load(tmp_path / "pools.json") == pools


def little_text() -> Pools:
    words = {
        "cpp": "int x{0} = f({0});\n",
        "math": "e**{0} + sin({0})\n",
        "prose": "A line about {0}.\n",
        "sql": "SELECT {0};\n",
    }

    def pieces(line: str, first: int) -> list[str]:
        return ["".join(line.format(n) for n in range(k, k + 30)) for k in range(first, first + 600, 30)]

    return Pools({d: pieces(w, 0) for d, w in words.items()}, {d: pieces(w, 5000)[:4] for d, w in words.items()})


@pytest.mark.long
def test_a_cell_runs_every_kind_of_arm_through_the_real_round_loop() -> None:
    arms = (
        "base", "centralised", "exact", "ffa", "fedsa", CLUSTERED, attack_arm(NOBODY, NOTHING),
        attack_arm("scale_100", NOTHING), attack_arm("scale_100", "multi_krum"), attack_arm("scale_100", "clip"),
    )  # fmt: skip
    job = CellJob(
        split="pathological", seed=1, arms=arms, base="tiny", bad=1,
        budget={**vars(budget()), "steps": 3, "learning_rate": 3e-3},
    )  # fmt: skip
    cell = child.run_cell(job, little_text())
    loss = {name: arm_loss(arm) for name, arm in cell["arms"].items()}
    assert loss["exact"] < loss["base"] and loss["centralised"] < loss["base"] and loss["ffa"] < loss["base"]
    calm, bare, wrapped, clipped = (loss[name] for name in arms[6:])
    assert calm == loss["exact"]  # the same orders, the same work, the same sum
    assert bare > 1.2 * calm and wrapped < 1.1 * calm and clipped < 1.1 * calm
    assert loss["fedsa"] < loss["base"] and set(cell["arms"]["fedsa"]["losses"]) == set(cell["shares"])
    assert len(cell["arms"]["exact"]["curve"]) == 2
    assert cell["arms"]["exact"]["curve"][-1] == pytest.approx(loss["exact"])
    assert set(cell["arms"][CLUSTERED]["assignment"]) == set(cell["shares"])
    dealt = [list(share["pieces"]) for share in cell["shares"].values()]
    assert dealt == [["cpp"], ["math"], ["prose"], ["sql"], ["cpp"]]


def test_a_cell_that_was_done_is_not_done_again_and_one_that_fails_says_why(tmp_path: Path) -> None:
    pools = tmp_path / "pools.json"
    little_text().save(pools)
    run = CellChildren(tmp_path / "cells", pools, processes=1)
    fields = {**vars(budget())}
    job = CellJob(split="iid", seed=1, arms=("base",), base="tiny", budget=fields)
    said: list[str] = []
    (first,) = run([job], lambda done: said.append(done.name))
    (answer,) = (tmp_path / "cells").glob("*.json")
    answer.write_text(json.dumps({**first, "kept": True}))
    (again,) = run([job], lambda done: said.append(done.name))
    assert again["kept"] is True and said == ["iid, seed 1"] * 2
    with pytest.raises(UnavailableError, match=r"iid, seed 1: its process ended with 1\n(.|\n)*no base"):
        run([CellJob(split="iid", seed=1, arms=("base",), base="/nowhere", budget=fields)], lambda done: None)


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "federation", "--splits", "even"])
    assert "pathological" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "federation", "--ranks", "4,x"])
    assert "whole numbers" in capsys.readouterr().err
