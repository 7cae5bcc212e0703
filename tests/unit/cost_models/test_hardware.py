"""Devices and links: the catalogue, the checks at birth, every error message."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest

from cost_models import DTYPE_BYTES, DeviceKind, HardwareError, Link, UnknownHardwareError
from cost_models.hardware import Catalog, builtin_catalog, device, link

DEVICES = ("h100", "h200", "a100", "v100", "v100-32gb", "cpu")
LINKS = (
    "nvlink4",
    "nvlink3",
    "nvlink2",
    "ib-400g",
    "ib-200g",
    "eth-25g",
    "shm",
    "loopback-tcp",
)


def test_catalogue_names() -> None:
    catalog = builtin_catalog()
    assert tuple(catalog.devices) == DEVICES
    assert tuple(catalog.links) == LINKS
    assert tuple(catalog.default_links) == DEVICES
    for pair in catalog.default_links.values():
        assert set(pair) <= set(LINKS)


@pytest.mark.parametrize("name", DEVICES)
def test_device_survives_its_record_and_pickle(name: str) -> None:
    kind = device(name)
    assert DeviceKind.from_dict(name, kind.to_dict()) == kind
    assert pickle.loads(pickle.dumps(kind)) == kind
    assert hash(copy.deepcopy(kind)) == hash(kind)
    assert set(kind.peak_flops) <= set(DTYPE_BYTES)
    assert kind.source


@pytest.mark.parametrize("name", LINKS)
def test_link_survives_its_record(name: str) -> None:
    assert Link.from_dict(name, link(name).to_dict()) == link(name)
    assert link(name).source


def test_datasheet_figures() -> None:
    assert device("h100").peak("bfloat16") == 989.4e12
    assert device("h200").memory_bytes == 139 * 2**30
    assert device("v100").memory_bytes == int(15.7 * 2**30)
    # p3.16xlarge: 25 Gbit/s a node for eight devices.
    assert link("eth-25g").bandwidth_bytes_per_s == 25e9 / 8 / 8


def test_what_is_not_known_of_a_host_is_left_out() -> None:
    record = device("h100").to_dict()
    assert DeviceKind.from_dict("d", record).can_offload
    older = {key: value for key, value in record.items() if not key.startswith("host_")}
    kind = DeviceKind.from_dict("d", older)
    assert not kind.can_offload and kind.to_dict() == older
    assert not device("cpu").can_offload


def test_constants_cannot_change() -> None:
    kind = device("h100")
    with pytest.raises(AttributeError):
        kind.launch_s = 0.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        kind.peak_flops["bfloat16"] = 1.0  # type: ignore[index]


def test_unknown_device_says_what_is_known_and_how_to_add() -> None:
    with pytest.raises(UnknownHardwareError) as error:
        device("h1000")
    assert str(error.value) == (
        "unknown device 'h1000'. Did you mean 'h100'? The known ones are h100, h200, a100, v100, "
        "v100-32gb, cpu. To add one, put its constants under [devices.h1000] of a cluster TOML "
        "file and load it with Cluster.from_toml(path)."
    )
    assert isinstance(error.value, ValueError)


def test_unknown_link_without_a_close_match() -> None:
    with pytest.raises(UnknownHardwareError, match=r"^unknown link 'xyz'\. The known ones are nvl"):
        link("xyz")


def test_unknown_dtype_is_not_guessed() -> None:
    with pytest.raises(UnknownHardwareError, match="no matmul rate for data type 'bfloat16'"):
        device("v100").peak("bfloat16")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peak_flops", {}, "peak_flops is empty"),
        ("peak_flops", {"int3": 1.0}, "unknown data type 'int3'; the known ones are float64"),
        ("peak_flops", {"float32": 0.0}, r"peak_flops\['float32'\] must be above 0; got 0.0"),
        ("memory_bytes", 0, "memory_bytes must be above 0; got 0"),
        ("vector_flops", float("nan"), "vector_flops must be a finite number in SI units; got nan"),
        ("launch_s", -1e-6, "launch_s must be 0 or more; got -1e-06"),
        ("matmul_efficiency", 1.5, "matmul_efficiency is a fraction, above 0 and at most 1"),
        ("source", " ", "source must be a text that is not empty"),
        ("name", "my chip", "a name is not empty and has no space, colon or plus sign"),
        ("host_bandwidth_bytes_per_s", 0, "host_bandwidth_bytes_per_s must be above 0; got 0"),
        ("host_optimizer_bytes_per_s", None, "host_bandwidth_bytes_per_s is given alone. Give bo"),
    ],
)
def test_device_is_checked_at_birth(key: str, value: Any, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        replace(device("h100"), **{key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bandwidth_bytes_per_s", 0.0, "bandwidth_bytes_per_s must be above 0"),
        ("efficiency", 0.0, "efficiency is a fraction"),
        ("latency_s", -1.0, "latency_s must be 0 or more"),
    ],
)
def test_link_is_checked_at_birth(key: str, value: Any, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        replace(link("nvlink4"), **{key: value})


def test_records_name_what_is_missing_unknown_or_of_the_wrong_type() -> None:
    record = link("shm").to_dict()
    with pytest.raises(HardwareError, match=r"link 'l' lacks launch_s; got .* Add what is missing"):
        Link.from_dict("l", {k: v for k, v in record.items() if k != "launch_s"})
    with pytest.raises(HardwareError, match=r"link 'l' has unknown keys latency\. Remove them"):
        Link.from_dict("l", {**record, "latency": 1})
    with pytest.raises(HardwareError, match=r"latency_s must be a finite number .* got '1us'"):
        Link.from_dict("l", {**record, "latency_s": "1us"})
    with pytest.raises(HardwareError, match="must be a table of named values; got 3"):
        Link.from_dict("l", 3)
    with pytest.raises(HardwareError, match=r"memory_bytes must be a whole number; got 1.5"):
        DeviceKind.from_dict("d", {**device("cpu").to_dict(), "memory_bytes": 1.5})
    with pytest.raises(HardwareError, match=r"default_links\.d lacks inter"):
        Catalog.from_dict({"default_links": {"d": {"intra": "shm"}}}, "file")


def test_shared_link_splits_its_bandwidth() -> None:
    half = link("nvlink4").shared_by(2)
    assert half.achieved_bytes_per_s == link("nvlink4").achieved_bytes_per_s / 2
    with pytest.raises(HardwareError, match="num_flows must be at least 1; got 0"):
        half.shared_by(0)
