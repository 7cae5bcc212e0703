"""Clusters: text, TOML and record forms, and what each says about bad input."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models import Cluster, ClusterError, HardwareError, NodeGroup, UnknownHardwareError
from cost_models.hardware import device, link

OWN_HARDWARE = """
inter = "ib-400g"
[[groups]]
num_nodes = 2
devices_per_node = 8
device = "mychip"
intra = "mylink"
[[groups]]
num_nodes = 1
devices_per_node = 4
device = "a100"
[devices.mychip]
peak_flops = { float32 = 1e13, bfloat16 = 1e14 }
vector_flops = 1e13
memory_bytes = 32e9
memory_bandwidth_bytes_per_s = 1e12
launch_s = 5e-6
matmul_efficiency = 0.8
memory_efficiency = 0.9
matmul_half_flops = 2e9
source = "mychip datasheet"
[links.mylink]
latency_s = 2e-6
bandwidth_bytes_per_s = 1e11
efficiency = 0.8
launch_s = 20e-6
source = "mylink datasheet"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "num_nodes", "num_devices", "intra", "inter"),
    [
        ("h100:1x8", 1, 8, "nvlink4", "ib-400g"),
        ("h200:2x8", 2, 16, "nvlink4", "ib-400g"),
        ("v100:8x8", 8, 64, "nvlink2", "eth-25g"),
        ("cpu:1x4", 1, 4, "shm", "loopback-tcp"),
        ("h100:1x8+a100:2x4", 3, 16, "nvlink4", "ib-200g"),
    ],
)
def test_text_form(text: str, num_nodes: int, num_devices: int, intra: str, inter: str) -> None:
    cluster = Cluster.parse(text)
    assert str(cluster) == text
    assert (cluster.num_nodes, cluster.num_devices) == (num_nodes, num_devices)
    assert cluster.groups[0].intra == link(intra)
    assert cluster.inter == link(inter)


def test_text_form_allows_spaces_between_groups() -> None:
    assert Cluster.parse(" h100:1x8 + a100:2x8 ") == Cluster.parse("h100:1x8+a100:2x8")


def test_equal_neighbours_are_one_group_and_ranks_go_by_group() -> None:
    assert str(Cluster.parse("h100:1x8+h100:2x8+h100:1x4")) == "h100:3x8+h100:1x4"
    cluster = Cluster.parse("h100:1x8+a100:2x4")
    assert (cluster.ranks(0), cluster.ranks(1)) == (range(8), range(8, 16))


@pytest.mark.parametrize("text", ["", "h100", "h100:8", "h100:1x", "h100:1x8+", "h100:-1x8", "1x8"])
def test_bad_text_says_what_was_got_and_how_to_write_it(text: str) -> None:
    with pytest.raises(ClusterError) as error:
        Cluster.parse(text)
    assert f"of the cluster {text!r}. Write DEVICE:NODESxDEVICES_PER_NODE" in str(error.value)


def test_text_with_no_devices_or_unknown_ones() -> None:
    with pytest.raises(ClusterError, match=r"num_nodes of the h100 nodes must be .* from 1; got 0"):
        Cluster.parse("h100:0x8")
    with pytest.raises(UnknownHardwareError, match=r"unknown device 'H100'. Did you mean 'h100'"):
        Cluster.parse("H100:1x8")


def test_uniform_takes_names_or_values() -> None:
    by_name = Cluster.uniform(num_nodes=2, devices_per_node=8, device="h100")
    by_value = Cluster.uniform(
        num_nodes=2,
        devices_per_node=8,
        device=device("h100"),
        intra=link("nvlink4"),
        inter="ib-400g",
    )
    assert by_name == by_value == Cluster.parse("h100:2x8")
    assert hash(by_name) == hash(by_value)


def test_device_without_usual_links_needs_them_named() -> None:
    chip = replace(device("h100"), name="mychip")
    with pytest.raises(ClusterError, match=r"device 'mychip' has no usual intra link. Name one as"):
        Cluster.uniform(num_nodes=1, devices_per_node=8, device=chip)
    with pytest.raises(ClusterError, match="device 'mychip' has no usual inter link"):
        Cluster.uniform(num_nodes=1, devices_per_node=8, device=chip, intra="nvlink4")


def test_cluster_needs_nodes_and_distinct_names() -> None:
    with pytest.raises(ClusterError, match="at least one group of nodes; got none"):
        Cluster((), link("shm"))
    other = replace(device("h100"), launch_s=1e-6)
    groups = (
        NodeGroup(1, 8, device("h100"), link("nvlink4")),
        NodeGroup(1, 8, other, link("nvlink4")),
    )
    with pytest.raises(
        ClusterError, match="two different devices of the cluster are called 'h100'"
    ):
        Cluster(groups, link("ib-400g"))


@pytest.mark.parametrize("text", ["h100:1x8", "cpu:1x4", "h100:1x8+a100:2x8"])
def test_record_round_trip_through_json(text: str) -> None:
    cluster = Cluster.parse(text)
    assert Cluster.from_dict(json.loads(json.dumps(cluster.to_dict()))) == cluster


def test_record_is_self_contained() -> None:
    """A saved plan keeps its numbers when the catalogue's change."""
    record = Cluster.parse("h100:1x8").to_dict()
    devices = record["devices"]
    assert isinstance(devices, dict)
    devices["h100"]["launch_s"] = 1.0
    assert Cluster.from_dict(record).groups[0].device.launch_s == 1.0


def test_toml_with_own_hardware_round_trips(tmp_path: Path) -> None:
    cluster = Cluster.from_toml(write(tmp_path / "c.toml", OWN_HARDWARE))
    assert str(cluster) == "mychip:2x8+a100:1x4"
    assert cluster.devices["mychip"].memory_bytes == 32_000_000_000
    assert cluster.links["mylink"].launch_s == 20e-6
    assert cluster.groups[1].intra == link("nvlink3")
    assert Cluster.from_dict(json.loads(json.dumps(cluster.to_dict()))) == cluster


def test_format_shown_in_the_docstring_is_read(tmp_path: Path) -> None:
    docstring = Cluster.from_toml.__doc__
    assert docstring is not None
    example = docstring.split("```toml")[1].split("```")[0]
    assert tomllib.loads(example)
    assert str(Cluster.from_toml(write(tmp_path / "c.toml", example))) == "mychip:2x8"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("inter =", "inter", "cannot read the cluster file .*c.toml: .*shows the format"),
        ("num_nodes = 2\n", "", r"c.toml: groups\[0\] lacks num_nodes"),
        ("num_nodes = 2", "num_nodes = 2.5", r"groups\[0\]: num_nodes must be a whole number"),
        ("[[groups]]", "[[nodes]]", "cluster lacks groups"),
        ("latency_s = 2e-6", "latency_us = 2", "link 'mylink' lacks latency_s"),
        ("matmul_efficiency = 0.8", "matmul_efficiency = 80", "matmul_efficiency is a fraction"),
    ],
)
def test_bad_toml(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Cluster.from_toml(write(tmp_path / "c.toml", OWN_HARDWARE.replace(old, new)))


def test_toml_errors_of_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cannot read the cluster file .*none.toml"):
        Cluster.from_toml(tmp_path / "none.toml")
    text = OWN_HARDWARE.replace('device = "mychip"', 'device = "mychap"')
    with pytest.raises(UnknownHardwareError, match=r"'mychap'. Did you mean 'mychip'"):
        Cluster.from_toml(write(tmp_path / "c.toml", text))
    with pytest.raises(ClusterError, match="at least one group"):
        Cluster.from_toml(write(tmp_path / "c.toml", "groups = []"))
    with pytest.raises(HardwareError, match="groups must be a list; got 'h100'"):
        Cluster.from_dict({"groups": "h100"})
