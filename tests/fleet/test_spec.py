"""fleet.spec: files, flags and settings become one complete experiment, or are refused with what would be right."""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleet import hosts
from fleet.errors import FleetError, SpecError
from fleet.experiment import Experiment
from fleet.spec import Registries, load
from fleet.spec_layers import GROUP_KEYS, RUN_KEYS
from fleet.spec_params import ENGINE_PARAMS, GUEST_PARAMS, HOST_PARAMS, host_kernel
from guestd.params import Param
from proto.config import HostKernel
from proto.errors import ProtoError, TraceError
from proto.trace import Trace, TraceMeta, write_trace
from proto.units import PS_PER_MS, PS_PER_S, PS_PER_US


@dataclass(frozen=True)
class Kind:
    """A policy or workload as its registry describes it."""

    params: tuple[Param, ...] = ()
    min_memory_bytes: int = 16 << 20
    view: str = "guest"
    fast_share: Fraction | None = None
    min_fast_ratio: Fraction = Fraction(0)
    shares_fast: bool = False

    @staticmethod
    def min_run_ps(params: object) -> int:
        return 0


SCAN = Param("scan_period", 1000, "ms", "time between two scans", "test", minimum=10, maximum=60_000)
BATCH = Param("batch", 32, "pages", "pages a time", "test", minimum=1)
QUIET = Param("quiet", False, "", "log nothing", "test")
SHARE = Param("share", 0.5, "", "share of something", "test", minimum=0, maximum=1)
LAYOUT = Param("layout", "end", "", "where the hot set lies", "test", ("end", "start", "scattered"))
FILE = Param("file", "", "path", "trace to replay", "test")
REGISTRIES = Registries(
    {
        "none": Kind(),
        "g-tpp": Kind((SCAN, BATCH)),
        "hyperplace": Kind((SCAN, QUIET, SHARE), 64 << 20),
        "h-tpp": Kind(view="host"),
        "all-fast": Kind(view="-", fast_share=Fraction(1)),
        "flat": Kind(min_fast_ratio=Fraction(1, 2)),
    },
    {"gups": Kind((LAYOUT, SHARE)), "trace": Kind((FILE,))},
)


def make(*settings_: str, path: Path | None = None, **flags: Any) -> Experiment:
    return load(path, flags, settings_, REGISTRIES)


def record(path: Path, first_page: int = 5, pages: int = 3) -> None:
    """A trace that touches so many pages in a row."""
    address = np.arange(first_page, first_page + pages, dtype=np.uint64) << np.uint64(12)
    write_trace(
        path,
        Trace(
            address, np.zeros(pages, np.uint8), np.ones(pages, np.uint16), np.zeros(pages, np.uint32), meta=TraceMeta()
        ),
    )


def spec_file(folder: Path, text: str) -> Path:
    path = folder / "spec.toml"
    path.write_text(text)
    return path


def test_without_anything_the_defaults_make_an_experiment() -> None:
    experiment = make()
    (guest,) = experiment.guests()
    assert (guest.policy, guest.workload, guest.vcpus, guest.run_ps) == ("none", "gups", 1, 10 * PS_PER_S)
    assert (guest.total_pages, guest.fast_pages, guest.slow_pages) == (131072, 26214, 104858)
    assert (guest.engine.quantum_ps, guest.engine.slice_ps, guest.engine.block) == (4 * PS_PER_MS, PS_PER_MS, 2048)
    assert (guest.kernel.hz, guest.kernel.sched_slice_ps, guest.kernel.ds_pages) == (250, 8 * PS_PER_MS, 16)
    assert guest.kernel.ds_prefault
    assert not guest.kernel.batched_unmap_flush
    assert guest.sample_ps == 100 * PS_PER_MS
    assert guest.workload_params == {"layout": "end", "share": 0.5}
    assert guest.costs == hosts.costs(hosts.load_profile(hosts.DEFAULT_PROFILE))
    host = experiment.host_config()
    assert (host.costs, host.engine, host.sample_ps) == (guest.costs, guest.engine, guest.sample_ps)
    assert host.hang_timeout_s == 60.0
    assert (
        host.kernel == guest.host == HostKernel() == host_kernel({param.name: param.default for param in HOST_PARAMS})
    )


def test_host_parameters_stand_beside_the_costs() -> None:
    experiment = make("host.pebs=legacy", "host.populate=yes", "host.pml_harvest=2s", "host.invept=600ns")
    (guest,) = experiment.guests()
    kernel = experiment.host_config().kernel
    assert guest.host == kernel == HostKernel(pebs="legacy", populate=True, pml_harvest_ps=2 * PS_PER_S)
    assert guest.costs.invept_ps == 600_000


def test_vcpus_are_counted_through_the_fleet(tmp_path: Path) -> None:
    path = spec_file(tmp_path, "[[group]]\nvms = 2\nvcpus = 3\n[[group]]\nvcpus = 4\n")
    assert [(guest.first_vcpu, guest.fleet_vcpus) for guest in make(path=path).guests()] == [(0, 10), (3, 10), (6, 10)]


def test_flags_and_settings_reach_every_guest() -> None:
    experiment = make(
        "policy.scan_period=0.5s",
        "policy.batch=2MiB",
        "workload.layout=scattered",
        "host.invept=600ns",
        "guest.sched_slice=10ms",
        "guest.batched_unmap_flush=yes",
        "engine.quantum=5ms",
        vms="3",
        policy="g-tpp",
        vcpus="4",
        memory="16GiB",
        fast_ratio="1/5",
        transactions="1e6",
        scale="1/16",
        seed="7",
    )
    guests = experiment.guests(lambda vm: f"log{vm}", lambda vm: Path(f"events{vm}"))
    assert [guest.vm for guest in guests] == [0, 1, 2]
    assert [guest.name for guest in guests] == ["vm0", "vm1", "vm2"]
    assert len({guest.seed for guest in guests}) == 3
    assert [(guest.log_path, guest.events_path) for guest in guests[:1]] == [("log0", "events0")]
    for guest in guests:
        assert guest.policy_params == {"scan_period": 500, "batch": 512}
        assert guest.workload_params["layout"] == "scattered"
        assert guest.costs.invept_ps == 600_000
        assert guest.kernel.sched_slice_ps == 10 * PS_PER_MS
        assert guest.kernel.batched_unmap_flush
        assert guest.engine.quantum_ps == 5 * PS_PER_MS
        assert guest.total_pages == (1 << 30) // 4096
        assert guest.fast_pages == round(Fraction(guest.total_pages, 5))
        assert guest.fast_pages + guest.slow_pages == guest.total_pages
        assert (guest.run_ps, guest.transactions) == (0, 62_500)


MIXED = """
seed = 3
memory = "64MiB"
policy = "g-tpp"
set.engine.block = 512
set.policy.scan_period = 2000

[[group]]
vms = 2

[[group]]
policy = "hyperplace"
memory = "128 MiB"
start = "250ms"
transactions = 1000
set.policy.quiet = true
set."guest.hz" = 1000

[[group]]
policy = "none"
workload = "trace"
seconds = 0.5
set.workload.file = "a.trace"
"""


def test_groups_override_the_top_level(tmp_path: Path) -> None:
    record(tmp_path / "a.trace")
    first, second, third, fourth = make(path=spec_file(tmp_path, MIXED)).guests()
    assert (first.policy, second.policy, third.policy, fourth.policy) == ("g-tpp", "g-tpp", "hyperplace", "none")
    assert (first.total_pages, third.total_pages) == (16384, 32768)
    # A setting for all reaches those that know it.
    assert first.policy_params["scan_period"] == third.policy_params["scan_period"] == 2000
    assert fourth.policy_params == {}
    assert (third.start_ps, third.transactions, third.run_ps) == (250 * PS_PER_MS, 1000, 0)
    assert (third.kernel.hz, first.kernel.hz) == (1000, 250)
    assert fourth.run_ps == PS_PER_S // 2
    assert fourth.workload_params["file"] == str(tmp_path / "a.trace")
    assert {guest.engine.block for guest in (first, second, third, fourth)} == {512}


def test_flags_override_the_file(tmp_path: Path) -> None:
    record(tmp_path / "a.trace")
    path = spec_file(tmp_path, MIXED)
    guests = make("policy.batch=1", path=path, policy="g-tpp", memory="32MiB", transactions=5).guests()
    assert {guest.policy for guest in guests} == {"g-tpp"}
    assert {guest.total_pages for guest in guests} == {8192}
    assert {(guest.run_ps, guest.transactions) for guest in guests} == {(0, 5)}
    # What a group set for another policy went with it; what the file set for all stays.
    assert [guest.policy_params for guest in guests] == [{"scan_period": 2000, "batch": 1}] * 4
    assert make(path=path, seed=9).seed == 9
    # None of it is known to the policy "none", and none of it was meant for it.
    assert {len(guest.policy_params) for guest in make(path=path, policy="none").guests()} == {0}


def test_a_flag_that_repeats_the_files_policy_keeps_what_its_groups_set(tmp_path: Path) -> None:
    path = spec_file(tmp_path, "policy = 'g-tpp'\n[[group]]\nset.policy.batch = 5\n")
    assert make(path=path, policy="g-tpp").guests()[0].policy_params["batch"] == 5


@pytest.mark.parametrize(
    ("flags", "sets", "says"),
    [
        ({"policy": "gtpp"}, (), "--policy: no policy 'gtpp'; did you mean 'g-tpp'?"),
        ({"workload": "gupps"}, (), "did you mean 'gups'"),
        ({"host": "xeon-8360y-optan"}, (), "did you mean 'xeon-8360y-optane'"),
        ({"clock": "realtime"}, (), "not yet"),
        ({"clock": "virtul"}, (), "did you mean 'virtual'"),
        ({"vms": "0"}, (), "--vms: must be between 1 and 65535, not 0"),
        ({"vms": "2.5"}, (), "whole number"),
        ({"vms": "many"}, (), "must be a number, not 'many'"),
        ({"vcpus": "1000"}, (), "--vcpus: must be between 1 and 256"),
        ({"memory": "17 MiB"}, (), "not a multiple of 2MiB; 16MiB would be"),
        ({"memory": "8MiB"}, (), "between 16MiB and 524286MiB"),
        ({"memory": "1TiB"}, (), "between 16MiB and 524286MiB"),
        ({"memory": "16 gigs"}, (), "is not a size"),
        ({"memory": "64MiB", "scale": "1/16"}, (), "after scale 1/16 must be between"),
        ({"memory": "32MiB", "policy": "hyperplace"}, (), "policy hyperplace needs at least 64MiB"),
        ({"fast_ratio": "1.5"}, (), "between 0 and 1"),
        ({"fast_ratio": "1/0"}, (), "must be a number"),
        ({"scale": "0"}, (), "above 0 and at most 1"),
        ({"scale": "2"}, (), "above 0 and at most 1"),
        ({"seconds": "0"}, (), "must be between"),
        ({"seconds": "-1"}, (), "is not a time"),
        ({"seconds": "5", "transactions": "5"}, (), "give one of them"),
        ({"transactions": "0"}, (), "must be between 1"),
        ({"seed": "-1"}, (), "--seed: must be between 0"),
        ({"name": "a/b"}, (), "without '/'"),
        ({"sample": "2ms"}, (), "shorter than engine.quantum"),
        ({}, ("policy.scan_period=1s",), "no policy parameter 'scan_period'; there is none"),
        ({"policy": "g-tpp"}, ("policy.scan_perod=1s",), "did you mean 'scan_period'"),
        ({"policy": "g-tpp"}, ("policy.scan_period=1ms",), "at least 10 ms, not 1ms"),
        ({"policy": "g-tpp"}, ("policy.scan_period=soon",), "is not a time"),
        ({"policy": "g-tpp"}, ("policy.scan_period=10.5",), "whole number of ms"),
        ({"policy": "hyperplace"}, ("policy.quiet=perhaps",), "true or false"),
        ({}, ("workload.layout=scatterd",), "did you mean 'scattered'"),
        ({}, ("workload.share=2",), "at most 1"),
        ({}, ("workload.share=nan",), "must be a number"),
        ({}, ("host.invpet=1us",), "did you mean 'invept'"),
        ({}, ("host.popolate=1",), "did you mean 'populate'"),
        ({}, ("host.pebs=legcy",), "did you mean 'legacy'"),
        ({}, ("host.ept_levels=3",), "at least 4"),
        ({}, ("guest.hertz=100",), "no guest parameter 'hertz'; did you mean 'hz'"),
        ({}, ("engine.quantm=5ms",), "did you mean 'quantum'"),
        ({}, ("engine.quantum=500us",), "engine.slice (1000us) is longer"),
        ({}, ("engine.block=1",), "at least 64"),
        ({}, ("polcy.x=1",), "did you mean 'policy'"),
        ({}, ("policy=1",), "name a parameter, policy.KEY"),
        ({}, ("workload.layout",), "write key=value"),
        ({"workload": "trace"}, (), "needs a file: --set workload.file=FILE"),
        ({"workload": "trace"}, ("workload.file=nowhere/x.trace",), "there is no directory nowhere"),
        ({"workload": "trace"}, ("workload.file=" + "x" * 5000,), "no such file: File name too long"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(flags: dict[str, Any], sets: tuple[str, ...], says: str) -> None:
    with pytest.raises(FleetError) as caught:
        make(*sets, **flags)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memroy = '64MiB'", "spec.toml: no key 'memroy'; did you mean 'memory'?"),
        ("[[group]]\npolicy = 'gtpp'", "spec.toml: group 1: policy: no policy 'gtpp'"),
        ("[[group]]\nseed = 1", "group 1: seed: belongs to the whole run"),
        ("[[group]]\nset.engine.block = 128", "group 1: set: engine.block: belongs to the whole run"),
        ("[[group]]\n[[group]]\nset.policy.batch = 1", "group 2: set.policy.batch: no parameter of policy 'none'"),
        ("group = 3", "[[group]]"),
        ("set = 3", "must be a table"),
        ("policy = 3", "spec.toml: policy: must be text, not 3"),
        ("vms = true", "must be a number"),
        ("fast_ratio = inf", "must be a number"),
        ("seconds = 1\ntransactions = 1", "give one of them"),
        ("this is not toml", "not valid TOML"),
        ("[costs]\ninvept_ps = 3", "spec.toml: costs: "),
        ("[[group]]\nvms = 65000\n[[group]]\nvms = 65000", "130000 VMs in all"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        make(path=spec_file(tmp_path, text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_gets_the_nearest_name(tmp_path: Path) -> None:
    spec_file(tmp_path, "")
    with pytest.raises(SpecError, match=r"did you mean 'spec.toml'"):
        make(path=tmp_path / "spce.toml")
    record(tmp_path / "a.trace")
    with pytest.raises(SpecError, match=r"did you mean 'a.trace'"):
        make(f"workload.file={tmp_path}/b.trace", workload="trace")


def test_a_trace_that_is_none_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "a.trace"
    record(trace, pages=4096)
    with pytest.raises(SpecError, match=r"16 MiB per VM cannot hold the trace a\.trace.*give at least 18MiB"):
        make(f"workload.file={trace}", workload="trace", memory="16MiB")
    assert make(f"workload.file={trace}", workload="trace", memory="18MiB").guests()
    trace = tmp_path / "b.trace"
    trace.write_text("no trace")
    with pytest.raises(TraceError, match=r"not a \.trace file"):
        make(f"workload.file={trace}", workload="trace")


def test_the_resolved_spec_does_not_need_the_profile_it_came_from(tmp_path: Path) -> None:
    profile = tmp_path / "lab.toml"
    profile.write_text('extends = "xeon-8360y-optane"\n')
    experiment = make("host.invept=1us", host=str(profile))
    profile.unlink()
    path = spec_file(tmp_path, experiment.to_toml())
    again = make(path=path)
    assert again == experiment
    assert again.host == "lab"
    # Another profile on the command line displaces the recorded costs; what was set by hand stays set.
    other = make(path=path, host="sapphire-rapids-ddr5-cxl")
    assert other.costs.slow.name == "CXL.mem"
    assert other.costs.invept_ps == 1_000_000


def test_a_policy_may_say_how_much_of_memory_is_fast(tmp_path: Path) -> None:
    assert [guest.fast_pages for guest in make(policy="all-fast", fast_ratio=0.25).guests()] == [131_072]
    resolved = make(policy="all-fast")
    assert resolved.tenants[0].fast_ratio == 1
    assert make(path=spec_file(tmp_path, resolved.to_toml())) == resolved
    # The policy's share is not the run's: another policy has the ratio that was asked for.
    assert make(policy="none", fast_ratio=0.25).guests()[0].fast_pages == 131_072 // 4


sizes = st.integers(8, 4096).map(lambda steps: f"{2 * steps}MiB")
times = st.integers(1, 10**9).map(lambda us: f"{us + 1000}us")
words = st.text(st.characters(codec="utf-8", exclude_characters="/", exclude_categories=("Cc", "Cs")), max_size=12)
groups = st.fixed_dictionaries(
    {
        "vms": st.integers(1, 5),
        "policy": st.sampled_from(["none", "g-tpp"]),
        "memory": sizes,
        "vcpus": st.integers(1, 64),
    },
    optional={
        "fast_ratio": st.one_of(st.floats(0, 1), st.fractions(0, 1).map(str)),
        "start": times,
        "seconds": times,
        "set": st.fixed_dictionaries(
            {},
            optional={
                "guest.hz": st.integers(1, 10_000),
                "guest.sched_slice": st.integers(100, 1_000_000),
                "guest.ds_prefault": st.booleans(),
                "workload.share": st.floats(0, 1),
                "workload.layout": st.sampled_from(LAYOUT.choices),
            },
        ),
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    tenants=st.lists(groups, min_size=1, max_size=3),
    seed=st.integers(0, (1 << 63) - 1),
    name=words.filter(lambda word: word not in (".", "..")),
    scale=st.sampled_from(["1", "1/2", "0.25"]),
    invept=st.integers(0, 10**6),
    block=st.integers(64, 1 << 16),
)
def test_a_resolved_spec_written_and_read_is_the_same_experiment(
    tmp_path: Path, *, tenants: list[dict[str, object]], seed: int, name: str, scale: str, invept: int, block: int
) -> None:
    for tenant in tenants:
        tenant["memory"] = f"{4 * int(str(tenant['memory']).removesuffix('MiB'))}MiB"
    path = tmp_path / "drawn.toml"
    path.write_text("".join("[[group]]\n" + _toml(tenant) for tenant in tenants))
    extra = (
        f"host.pml_harvest={block}",
        f"host.sched_slice={block + 100}",
        f"host.thp={('never', 'always')[block % 2]}",
    )
    experiment = make(
        f"host.invept={invept}ps", f"engine.block={block}", *extra, path=path, seed=seed, name=name, scale=scale
    )
    again = make(path=spec_file(tmp_path, experiment.to_toml()))
    assert again == experiment
    assert again.guests() == experiment.guests()
    assert again.host_config() == experiment.host_config()
    assert again.digest == experiment.digest
    assert again.to_toml() == experiment.to_toml()


def _toml(table: dict[str, object]) -> str:
    plain = {key: value for key, value in table.items() if key != "set"}
    lines = [f"{key} = {msgspec.json.encode(value).decode()}\n" for key, value in plain.items()]
    extra = table.get("set", {})
    assert isinstance(extra, dict)
    return "".join(lines + [f"set.{key} = {msgspec.json.encode(value).decode()}\n" for key, value in extra.items()])


def test_the_digest_says_what_is_run_and_nothing_else(tmp_path: Path) -> None:
    base = make()
    assert base.digest == make(name="another").digest
    assert base.digest == make("host.invept=500ns").digest
    for changed in (
        make(seed=2),
        make(vms=2),
        make("host.invept=501ns"),
        make("host.pebs=legacy"),
        make("guest.thp=always"),
        make("workload.share=0.25"),
        make(scale="1/2"),
    ):
        assert changed.digest != base.digest
    # A trace counts by its content, wherever it lies.
    for folder in "ac":
        (tmp_path / folder).mkdir()
        record(tmp_path / folder / "x.trace", first_page=ord(folder))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.trace").write_bytes((tmp_path / "a" / "x.trace").read_bytes())
    a, b, c = (make(f"workload.file={tmp_path}/{folder}/x.trace", workload="trace").digest for folder in "abc")
    assert a == b
    assert a != c


def test_the_declared_parameters_have_defaults_within_their_own_bounds() -> None:
    for param in (*ENGINE_PARAMS, *GUEST_PARAMS, *HOST_PARAMS):
        assert param.source
        if not isinstance(param.default, bool | str):
            assert param.minimum is not None
            assert param.maximum is not None
            assert param.minimum <= param.default <= param.maximum
    assert make("guest.sched_slice=8000").guests()[0].kernel.sched_slice_ps == 8000 * PS_PER_US


odd = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from(["1e999999999", "1/3", "-0", "٣", "16MiB", "1" * 5000, "0x10", "1_000", "1s ", "%", "%%", "\x00"]),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
KEYS = [*RUN_KEYS, *GROUP_KEYS, "set", "group", "costs"]
SETTINGS = ["policy.scan_period", "policy.batch", "workload.layout", "workload.share", "host.invept", "host.fast.curve",
            "host.pebs", "host.populate", "host.pml_harvest", "guest.thp", "guest.page_table_levels",
            "host.slow.granule_bytes", "guest.hz", "guest.ds_prefault", "engine.slice", "engine.block"]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.dictionaries(st.sampled_from(KEYS), odd, max_size=4), st.dictionaries(st.sampled_from(SETTINGS), odd, max_size=3)
)
def test_whatever_the_file_says_it_is_read_or_refused_in_one_line(
    tmp_path: Path, table: dict[str, object], extra: dict[str, object]
) -> None:
    table = {key: value for key, value in table.items() if value is not None}
    table["set"] = table.get("set", {key: value for key, value in extra.items() if value is not None})
    path = tmp_path / "odd.toml"
    lines = [f"{key} = {_inline(value)}\n" for key, value in table.items()]
    path.write_text("".join(lines), errors="surrogateescape")
    try:
        experiment = make(path=path)
    except (FleetError, ProtoError) as error:
        assert str(error)
    else:
        assert make(path=spec_file(tmp_path, experiment.to_toml())) == experiment


def _inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_inline(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def test_the_examples_resolve() -> None:
    folder = Path(__file__).parents[2] / "examples"
    assert {guest.policy for guest in load(folder / "quickstart.toml").guests()} >= {
        "none",
        "hyperplace",
        "g-tpp",
        "h-tpp",
    }
    assert len(load(folder / "mixed_tenants.toml").guests()) == 4


def test_populated_memory_leaves_a_host_side_policy_nothing_to_do() -> None:
    with pytest.raises(SpecError, match=r"host\.populate: pins all memory, .*'h-tpp'.*host\.populate=false"):
        make("host.populate=true", policy="h-tpp")
    assert make("host.populate=true", policy="g-tpp").host_kernel.populate


def test_a_host_that_acts_at_barriers_needs_one_a_tick() -> None:
    with pytest.raises(
        SpecError, match=r"4ms is longer than a tick \(1ms at guest.hz=1000\).* set engine.quantum=1ms or less"
    ):
        make("guest.hz=1000", policy="h-tpp")
    assert make("guest.hz=1000", "engine.quantum=1ms", policy="h-tpp").engine.quantum_ps == PS_PER_MS
    assert make("guest.hz=1000", policy="g-tpp").tenants[0].kernel.hz == 1000
