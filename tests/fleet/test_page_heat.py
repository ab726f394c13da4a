"""Page heat from the command line to table and picture; files of guests that were killed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fleet import page_heat, run
from proto.layout import HEAT
from proto.units import PS_PER_S

ROOT = Path(run.__file__).parent.parent
SPEC = """
memory = "4GiB"
scale = "1/128"
vcpus = 2
seconds = 0.2
sample = "20ms"
heat = true
[[group]]
policy = "hyperplace"
set.policy = { load_period = 23, epoch_ms = 10, tau_split = 1, initial = "ram" }
[[group]]
policy = "h-tpp"
workload = "silo"
set.policy = { scan_delay_ms = 0, scan_period_min_ms = 20 }
"""


def fleet(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fleet", "run", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(400)
def test_a_run_shows_where_its_accesses_went(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    out = tmp_path / "out"
    done = fleet(tmp_path / "spec.toml", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"heat:    {out / 'heat.png'}" in done.stdout
    with Image.open(out / "heat.png") as image:
        assert np.asarray(image.convert("L")).min() < 64
    assert not list(out.glob("heat.*.bin"))
    summary = json.loads((out / "summary.json").read_text())
    heat, rows = pq.read_table(out / "heat.parquet"), pq.read_table(out / "timeseries.parquet")
    for vm in summary["vms"]:
        assert set(vm["locality"]) == {"gva", "gpa", "hpa"}
        for space in vm["locality"]:
            mine = pc.and_(pc.equal(heat["vm"], vm["id"]), pc.equal(heat["space"].cast("string"), space))
            assert pc.sum(heat.filter(mine)["accesses"]).as_py() == vm["access"]["total"]
        assert vm["hotness"]["hot_set"] == "policy"
        own = rows.filter(pc.and_(pc.equal(rows["vm"], vm["id"]), pc.equal(rows["phase"], "run")))
        for name in ("precision", "recall", "f1", "oracle_fast_ratio"):
            values = own[f"hotness.{name}"].to_pylist()
            assert len(values) > 5 and all(0 <= value <= 1 for value in values)
        assert max(own["hotness.f1"].to_pylist()) > 0
    assert "ranges" in summary["vms"][0]["locality"]["gva"]
    assert "ranges" not in summary["vms"][1]["locality"]["gva"]
    assert summary["vms"][0]["pebs"]["cpu_ns_per_sample"]["modelled"] > 0

    again = fleet(out / "spec.toml", "--json", "--out", tmp_path / "again")
    assert json.loads(again.stdout)["digest"] == summary["digest"]
    assert pq.read_table(tmp_path / "again" / "heat.parquet").equals(heat)
    assert not (tmp_path / "again" / "heat.png").exists()
    without = fleet(out / "spec.toml", "--no-heat", "--json", "--out", tmp_path / "without")
    assert not list((tmp_path / "without").glob("heat*"))
    for vm, plain in zip(summary["vms"], json.loads(without.stdout)["vms"], strict=True):
        assert "locality" not in plain
        assert all(vm[key] == plain[key] for key in ("access", "vmstat", "kvm", "hotness"))


def test_a_wrong_value_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text("heat = 3\n")
    refused = fleet(tmp_path / "spec.toml", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1 and "heat" in refused.stderr


def test_what_a_killed_guest_left_is_kept_up_to_its_last_record(tmp_path: Path) -> None:
    records = np.zeros(3, HEAT)
    records["time_ps"], records["space"], records["address"] = PS_PER_S, [0, 1, 2], [7 << 21, 0, 1 << 21]
    records["accesses"], records["hot_pages"] = [5, 6, 7], [1, 0, 2]
    (tmp_path / "heat.vm0.bin").write_bytes(records.tobytes()[:-3])
    assert page_heat.merge([tmp_path / "heat.vm0.bin", tmp_path / "heat.vm1.bin"], tmp_path / "heat.parquet") == 2
    table = pq.read_table(tmp_path / "heat.parquet")
    assert table.to_pydict() == {
        "vm": [0, 0], "time_s": [1.0, 1.0], "space": ["gva", "gpa"], "address": [7 << 21, 0], "accesses": [5, 6],
        "hot_pages": [1, 0],
    }  # fmt: skip
    assert not (tmp_path / "heat.vm0.bin").exists()


def test_without_accesses_there_is_no_picture(tmp_path: Path) -> None:
    page_heat.merge([], tmp_path / "heat.parquet")
    assert not page_heat.draw({"vms": [{"id": 0}]}, tmp_path / "heat.parquet", tmp_path / "heat.png")
    assert [path.name for path in tmp_path.iterdir()] == ["heat.parquet"]
