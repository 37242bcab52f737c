"""Model files: exact round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import structures
import torch
from hypothesis import given
from hypothesis import strategies as st

from orbcalc.errors import CheckpointError, ConfigError
from orbcalc.files import file_sha256
from orbcalc.model.archive import read_archive, write_archive
from orbcalc.model.checkpoint import (
    load_model,
    potential_content,
    potential_from,
    save_model,
)
from orbcalc.model.committee import Calibration, Committee
from orbcalc.testing import predicted

MEMBERS = ("manifest.json", "content.json", "tensors.safetensors")


@pytest.fixture(scope="module")
def model(make_potential):
    members = [make_potential(seed=seed, channels=4) for seed in (1, 2)]
    return Committee(members, Calibration(energy=1.5, forces=0.7))


@pytest.fixture(scope="module")
def good_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.orbcalc"
    save_model(path, model, {"methods": {"energy": "GFN2-xTB (tblite)"}, "metrics": {"mae": 0.1}})
    return path


@pytest.fixture(scope="module")
def good(good_file):
    return good_file.read_bytes()


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in MEMBERS}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def rewrite(source, target, *, sign=True, **changes):
    """Copy a model file with changed parts, and sign it again as an attacker would."""
    members = members_of(source)
    for name, change in changes.items():
        key = {"manifest": MEMBERS[0], "content": MEMBERS[1], "tensors": MEMBERS[2]}[name]
        if name == "tensors":
            tensors = safetensors.torch.load(members[key])
            change(tensors)
            members[key] = safetensors.torch.save(tensors)
        else:
            data = json.loads(members[key])
            change(data)
            members[key] = json.dumps(data).encode()
        if sign and name != "manifest":
            manifest = json.loads(members[MEMBERS[0]])
            manifest["sha256"][key] = hashlib.sha256(members[key]).hexdigest()
            members[MEMBERS[0]] = json.dumps(manifest).encode()
    return write_zip(target, members)


# -------------------------------------------------------------------------- round trip
def test_a_round_trip_is_exact(model, good_file):
    found, metadata = load_model(good_file, dtype=torch.float64)
    assert metadata == {"methods": {"energy": "GFN2-xTB (tblite)"}, "metrics": {"mae": 0.1}}
    assert found.calibration == model.calibration
    assert len(found.members) == 2
    batch = [structures.ethanol(), structures.ammonium(), structures.ice_cell()]
    for before, after in zip(predicted(model, batch), predicted(found, batch), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_every_weight_and_buffer_survives(potential_of_dtype, tmp_path):
    path = tmp_path / "model.orbcalc"
    save_model(path, Committee([potential_of_dtype]))
    found, _ = load_model(path, dtype=potential_of_dtype.dtype)
    old, new = potential_of_dtype.state_dict(), found.first.state_dict()
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert torch.equal(new[name], value), name
    old, new = dict(potential_of_dtype.named_buffers()), dict(found.first.named_buffers())
    for name, value in old.items():
        torch.testing.assert_close(new[name], value, atol=1e-7, rtol=1e-7)
    assert torch.equal(found.first.reference_energies, potential_of_dtype.reference_energies)
    assert found.first.energy_scale == potential_of_dtype.energy_scale
    assert found.first.shells == potential_of_dtype.shells
    assert found.first.config == potential_of_dtype.config


def test_equal_models_are_equal_files(model, good_file, good, tmp_path):
    again = tmp_path / "again.orbcalc"
    found, metadata = load_model(good_file, dtype=torch.float64)
    save_model(again, found, metadata)
    assert again.read_bytes() == good
    assert file_sha256(again) == hashlib.sha256(good).hexdigest()


def test_a_loaded_model_is_for_inference(good_file):
    found, _ = load_model(str(good_file))
    assert found.first.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not found.first.training


def test_loading_leaves_random_numbers_and_dtype_alone(good_file):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    load_model(good_file)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state[1]).all()  # noqa: NPY002
    assert torch.get_default_dtype() == torch.float32


def test_the_file_says_what_it_is(good_file):
    members = members_of(good_file)
    manifest, content = json.loads(members[MEMBERS[0]]), json.loads(members[MEMBERS[1]])
    assert manifest["format"] == "orbcalc model"
    assert manifest["format_version"] == 4
    assert content["units"]["energy"] == "eV"
    assert content["members"][0]["elements"] == [1, 6, 7, 8, 9, 11, 16, 17, 26]
    assert content["members"][0]["config"]["cutoff"] == 4.0


# ---------------------------------------------------------------------- damaged files
def loads_the_same(path, good_file):
    """True if a file still gives the same content; CheckpointError passes through."""
    content, tensors = read_archive(path, kind="model", version=4)
    expected, weights = read_archive(good_file, kind="model", version=4)
    return content == expected and all(torch.equal(tensors[k], v) for k, v in weights.items())


def test_truncated_files(good, tmp_path):
    path = tmp_path / "short.orbcalc"
    lengths = [0, 1, 3, 4, 21, 22, 30, 100, len(good) // 2, len(good) - 23, len(good) - 1]
    for length in {*lengths, *range(50, len(good), len(good) // 60)}:
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"short\.orbcalc is no orbcalc model, or it is"):
            load_model(path)


def test_flipped_bits(good, good_file, tmp_path):
    """Each flip is noticed, unless it is in a part of the zip that carries no content."""
    path = tmp_path / "flipped.orbcalc"
    rng = np.random.default_rng(0)
    # All of the zip's own directory at the end, and a sample of the rest.
    places = {*rng.integers(0, len(good), 250).tolist(), *range(len(good) - 260, len(good))}
    n_noticed = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        message = None
        try:
            assert loads_the_same(path, good_file), place
        except CheckpointError as error:
            message = str(error)
            n_noticed += 1
        assert message is None or "flipped.orbcalc" in message
    assert n_noticed > 250


@given(st.binary(max_size=200))
def test_noise_is_no_model(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "noise.orbcalc"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Pickled files are never opened"):
        load_model(path)


def test_bytes_before_and_after(good, tmp_path):
    """A zip may have a prefix; what is read is verified all the same."""
    path = tmp_path / "model.orbcalc"
    path.write_bytes(b"#!/bin/sh\n" + good)
    load_model(path)
    path.write_bytes(good + b"x" * 70_000)
    with pytest.raises(CheckpointError, match="is no orbcalc model"):
        load_model(path)


# ---------------------------------------------------------------------- hostile files
class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("inside_zip", [False, True])
@pytest.mark.parametrize("dump", ["pickle", "torch"])
def test_pickles_are_never_opened(good_file, tmp_path, dump, inside_zip):
    marker = tmp_path / "executed"
    buffer = io.BytesIO()
    (pickle.dump if dump == "pickle" else torch.save)(Payload(marker), buffer)
    path = tmp_path / "model.orbcalc"
    path.write_bytes(buffer.getvalue())
    if inside_zip:
        members = members_of(good_file) | {"tensors.safetensors": buffer.getvalue()}
        manifest = json.loads(members["manifest.json"])
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        manifest["sha256"]["tensors.safetensors"] = digest
        write_zip(path, members | {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(CheckpointError):
        load_model(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload itself works"


def test_a_compressed_member_is_refused_before_it_unfolds(good_file, tmp_path):
    bomb = members_of(good_file) | {"tensors.safetensors": bytes(50_000_000)}
    path = write_zip(tmp_path / "bomb.orbcalc", bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 500_000
    with pytest.raises(CheckpointError, match="is compressed"):
        load_model(path)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_missing_member(good_file, tmp_path, member):
    members = members_of(good_file)
    del members[member]
    with pytest.raises(CheckpointError, match=f"no item named '{member}'"):
        load_model(write_zip(tmp_path / "model.orbcalc", members))


def test_altered_content_without_a_new_hash(good_file, tmp_path):
    def other_energy(content):
        content["members"][0]["reference_energies"][0] += 1.0

    path = rewrite(good_file, tmp_path / "a.orbcalc", sign=False, content=other_energy)
    with pytest.raises(CheckpointError, match=r"content\.json in .* was altered: its SHA-256 is"):
        load_model(path)


def test_tensors_that_claim_to_be_huge(good_file, tmp_path):
    header = json.dumps({"w": {"dtype": "F64", "shape": [10**9], "data_offsets": [0, 8 * 10**9]}})
    data = len(header).to_bytes(8, "little") + header.encode()
    members = members_of(good_file) | {"tensors.safetensors": data}
    manifest = json.loads(members["manifest.json"])
    manifest["sha256"]["tensors.safetensors"] = hashlib.sha256(data).hexdigest()
    members["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(CheckpointError, match=r"tensors of .* are damaged"):
        load_model(write_zip(tmp_path / "huge.orbcalc", members))


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "{", '"text"', "[]", "{}", "null", "\xff", "1" * 5000, '{"format": NaN}'],
)
def test_manifests_that_are_not(good_file, tmp_path, text):
    members = members_of(good_file) | {"manifest.json": text.encode("latin-1")}
    with pytest.raises(CheckpointError, match="model"):
        load_model(write_zip(tmp_path / "model.orbcalc", members))


@pytest.mark.parametrize("text", ["[" * 200_000, '"text"', "[]", "{}", "null"])
def test_contents_that_are_not(good_file, tmp_path, text):
    members = members_of(good_file) | {"content.json": text.encode()}
    manifest = json.loads(members["manifest.json"])
    manifest["sha256"]["content.json"] = hashlib.sha256(text.encode()).hexdigest()
    members["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(CheckpointError):
        load_model(write_zip(tmp_path / "model.orbcalc", members))


def newer(manifest):
    manifest["format_version"] = 5


def older(manifest):
    manifest["format_version"] = 3


def version_of_another_type(manifest):
    manifest["format_version"] = "4"


def other_format(manifest):
    manifest["format"] = "orbcalc training state"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, r"has format version 5, this orbcalc reads 4\. Update orbcalc"),
        (older, r"has format version 3, this orbcalc reads 4\. .*train again"),
        (version_of_another_type, "has format version '4'"),
        (other_format, "is of format 'orbcalc training state', expected 'orbcalc model'"),
    ],
)
def test_another_format(good_file, tmp_path, change, message):
    path = rewrite(good_file, tmp_path / "model.orbcalc", manifest=change)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


# ----------------------------------------------------------- contradictions, well signed
def set_first(name, value):
    def change(content):
        content["members"][0][name] = value

    return change


def set_calibration(name, value):
    def change(content):
        content["calibration"][name] = value

    return change


def set_config(name, value):
    def change(content):
        content["members"][0]["config"][name] = value

    return change


CONTRADICTIONS = {
    "fewer elements": (set_first("elements", [1, 6, 8]), "contradicts itself"),
    "no elements": (set_first("elements", []), "are not atomic numbers"),
    "impossible elements": (set_first("elements", [1, 6, 7, 8, 9, 11, 16, 17, 400]), "400"),
    "words": (set_first("elements", "iron"), "contradicts itself"),
    "other elements": (
        set_first("elements", [1, 6, 7, 8, 9, 11, 16, 17, 27]),
        "must share elements",
    ),
    "short energies": (set_first("reference_energies", [1.0]), "as many reference energies"),
    "no scale": (set_first("energy_scale", None), "contradicts itself"),
    "no shells": (set_first("shells", {}), "contradicts itself"),
    "f shells": (set_first("shells", {"26": [3]}), "do not fit the slots"),
    "too many channels": (set_config("channels", 10**6), "channels"),
    "other channels": (set_config("channels", 8), "its configuration says"),
    "unknown key": (set_config("dropout", 0.5), "unknown key 'dropout'"),
    "other head": (set_config("charge_head", "none"), "contradicts itself"),
    "too large": (set_first("energy_scale", 10**400), "contradicts itself"),
    "more radial functions": (set_config("radial_functions", 64), "its configuration says"),
    "wider messages": (set_config("message_channels", 512), "its configuration says"),
    "more layers": (set_config("layers", 4), "contradicts itself"),
    "no members": (lambda content: content.update(members=[]), "at least one potential"),
    "metadata of words": (lambda content: content.update(metadata="words"), "contradicts itself"),
    "electrons of words": (
        lambda content: content.update(metadata={"training_set": {"electrons": [["a", 1]]}}),
        "electrons",
    ),
    "labels of numbers": (lambda content: content.update(metadata={"labels": 3}), "labels"),
    "no neighbours": (set_first("neighbor_scale", 0), "not all finite and above zero"),
    "scale of words": (set_first("energy_scale", "nan"), "not all finite and above zero"),
    "an element twice": (set_first("elements", [1, 1, 8]), "are not atomic numbers, each once"),
    "negative errors": (set_calibration("energy", -1.0), "energy is -1.0, expected a number >= 0"),
    "errors of words": (set_calibration("energy", "abc"), "energy"),
    "no errors": (set_calibration("energy_95", None), "energy_95"),
    "no calibration": (lambda content: content.pop("calibration"), "calibration"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contents_that_contradict_the_weights(good_file, tmp_path, name):
    change, message = CONTRADICTIONS[name]
    path = rewrite(good_file, tmp_path / "model.orbcalc", content=change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert "model.orbcalc" in str(caught.value)


@pytest.mark.parametrize("name", ["energy_scale", "neighbor_scale", "reference_energies"])
def test_numbers_beside_the_weights_are_finite(model, name):
    content = potential_content(model.first)  # JSON reads 1e999 as infinite
    content[name] = [np.inf] * len(content[name]) if name == "reference_energies" else np.inf
    with pytest.raises(ConfigError, match="finite"):
        potential_from(content, torch.float32)
    with pytest.raises(ConfigError, match=r"energy is inf, expected a number >= 0"):
        Calibration(energy=np.inf)


def first_weight(value):
    def change(tensors):
        tensors["0.backbone.elements.weight"][0, 0] = value

    return change


def drop(tensors):
    del tensors["1.backbone.elements.weight"]


def add(tensors):
    tensors["0.surplus"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_weight(np.nan), r"weight backbone\.elements\.weight holds NaN or infinity"),
        (first_weight(np.inf), "holds NaN or infinity: the training failed"),
        (drop, r"backbone\.elements\.weight"),
        (add, "surplus"),
    ],
)
def test_weights_that_cannot_be(good_file, tmp_path, change, message):
    path = rewrite(good_file, tmp_path / "model.orbcalc", tensors=change)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


# ------------------------------------------------------------------------- reading, writing
def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*missing\.orbcalc"):
        load_model(tmp_path / "missing.orbcalc")
    with pytest.raises(CheckpointError, match="cannot read"):
        load_model(tmp_path)


def fail(code):
    def raise_it(*_, **__):
        raise OSError(code, os.strerror(code))

    return raise_it


@pytest.mark.parametrize(
    ("target", "code"),
    [("os.fsync", errno.ENOSPC), ("os.replace", errno.EACCES), ("os.fsync", errno.EIO)],
)
def test_a_failed_write_leaves_the_old_file(model, good_file, tmp_path, monkeypatch, target, code):
    path = tmp_path / "model.orbcalc"
    path.write_bytes(good_file.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(target, fail(code))
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            save_model(path, Committee([model.first]))
    assert path.read_bytes() == good_file.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
        save_model(tmp_path / "missing" / "model.orbcalc", model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, np.float32(1)])
def test_metadata_that_json_does_not_have(model, good_file, tmp_path, value):
    path = tmp_path / "model.orbcalc"
    path.write_bytes(good_file.read_bytes())
    with pytest.raises(CheckpointError, match="JSON"):
        save_model(path, model, {"metrics": {"mae": value}})
    assert path.read_bytes() == good_file.read_bytes()


def test_a_model_with_nan_weights_is_not_written(make_potential, tmp_path):
    broken = make_potential(channels=4)
    with torch.no_grad():
        broken.backbone.elements.weight[0] = torch.nan
    path = tmp_path / "model.orbcalc"
    with pytest.raises(CheckpointError, match="holds NaN"):
        save_model(path, Committee([broken]))
    assert not path.exists()


def test_archives_of_another_kind(tmp_path):
    path = tmp_path / "state"
    write_archive(path, kind="training state", version=3, content={"step": 1}, tensors={})
    assert read_archive(path, kind="training state", version=3) == ({"step": 1}, {})
    with pytest.raises(CheckpointError, match="expected 'orbcalc model'"):
        load_model(path)


def test_shared_and_strided_tensors_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": base.T, "column": base[:, 1]}
    write_archive(tmp_path / "a", kind="model", version=4, content={}, tensors=tensors)
    _, found = read_archive(tmp_path / "a", kind="model", version=4)
    assert torch.equal(found["transposed"], base.T)
    assert torch.equal(found["column"], base[:, 1])
