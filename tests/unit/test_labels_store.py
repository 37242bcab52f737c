"""The label store: merging, conflicts, and what happens when the writer or the disk gives up."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import ase.db
import numpy as np
import pytest
import structures
from ase import Atoms
from ase.constraints import FixAtoms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orbcalc.errors import LabelConflictError, LabelError, MissingLabelError
from orbcalc.labels.label import KINDS, Label, LabelStatus, Provenance
from orbcalc.labels.sources import is_label_store
from orbcalc.labels.store import LabelStore
from orbcalc.labels.xtb import OrbitalChargeLabeler
from orbcalc.orbitals import atomic_charges
from orbcalc.properties import (
    REF_ENERGY,
    REF_FORCES,
    REF_STRESS,
    XTB_BLOCKS,
    XTB_ENERGY,
    XTB_FORCES,
    XTB_SHELLS,
)
from orbcalc.structures import structure_key

PROVENANCE = Provenance("PBE", "code", "1.0", {"cutoff": 500})


@pytest.fixture(params=[".db", ".aselmdb"])
def path(request, tmp_path):
    if request.param == ".aselmdb":
        pytest.importorskip("ase_db_backends")
        pytest.importorskip("lmdb")
    return tmp_path / f"labels{request.param}"


def helium(number):
    return Atoms("He", positions=[[0.1 * number, 0, 0]])


def reference(atoms, status="ok", *, energy=-1.0, forces=False, provenance=PROVENANCE, wall=0.5):
    values = {}
    if status == "ok":
        values = {"energy": energy} | ({"forces": np.zeros((len(atoms), 3))} if forces else {})
    key = structure_key(atoms)
    return Label(key, "reference", LabelStatus(status), provenance, values, wall, f"it is {status}")


def same(first, second):
    assert (first.key, first.kind, first.status) == (second.key, second.kind, second.status)
    assert (first.provenance, first.message) == (second.provenance, second.message)
    assert first.wall_time_s == second.wall_time_s
    assert set(first.values) == set(second.values)
    for name, value in first.values.items():
        np.testing.assert_array_equal(value, second.values[name])


def test_what_goes_in_comes_out(path):
    atoms = structures.ferrocene()
    atoms.info.update(name="ferrocene", charge=0, weights=np.arange(3), number=np.int64(4))
    atoms.set_constraint(FixAtoms([0]))
    sites = np.arange(2.0 * len(atoms)).reshape(-1, 2)
    atoms.set_array("sites", sites)
    charges = OrbitalChargeLabeler().label(atoms)
    energy = reference(atoms, forces=True)
    energy.values["forces"] += 0.5
    with_path = LabelStore(path)
    with_path.add(atoms, [charges, energy])
    store = LabelStore(path, create=False)
    key = structure_key(atoms)
    same(store.get(key, "charges"), charges)
    same(store.get(key, "reference"), energy)
    (found,) = store.labelled_atoms()
    assert structure_key(found) == key
    assert found.calc is None
    assert found.info["name"] == "ferrocene"
    assert found.info["number"] == 4
    np.testing.assert_array_equal(found.info["weights"], np.arange(3))
    np.testing.assert_array_equal(found.arrays["sites"], sites)
    assert found.info["structure_key"] == key
    assert found.info[REF_ENERGY] == -1.0
    assert found.info[XTB_ENERGY] == charges.values["energy"]
    np.testing.assert_array_equal(found.arrays[REF_FORCES], 0.5)
    np.testing.assert_array_equal(found.arrays[XTB_FORCES], charges.values["forces"])
    np.testing.assert_array_equal(found.arrays[XTB_BLOCKS], charges.values["orbital_blocks"])
    np.testing.assert_array_equal(found.arrays[XTB_SHELLS], charges.values["shells"])
    assert atomic_charges(found.arrays[XTB_BLOCKS]).sum() == pytest.approx(0, abs=1e-9)
    assert store.shells() == {1: (0, 0), 6: (0, 1), 26: (2, 0, 1)}


def test_periodic_structures_charge_and_stress(path):
    atoms = structures.ice_cell()
    atoms.info.update(charge=1, spin=2)
    label = reference(atoms)
    label.values["stress"] = np.arange(6.0)
    store = LabelStore(path)
    store.add(atoms, [label])
    (found,) = store.labelled_atoms([structure_key(atoms)])
    assert structure_key(found) == structure_key(atoms)
    assert found.info["charge"] == 1
    np.testing.assert_array_equal(found.info[REF_STRESS], np.arange(6.0))


def test_failures_are_kept_but_not_trained_on(path):
    store = LabelStore(path)
    atoms = helium(0)
    key = structure_key(atoms)
    store.add(atoms, [reference(atoms, "timeout")])
    assert store.status(key, "reference") == LabelStatus.timeout
    assert not store.has(key, "reference")
    assert store.get(key, "reference").message == "it is timeout"
    (found,) = store.labelled_atoms()
    assert REF_ENERGY not in found.info
    store.add(atoms, [reference(atoms, "scf_failed")])
    assert LabelStore(path).status(key, "reference") == LabelStatus.scf_failed
    store.add(atoms, [reference(atoms)])
    store.add(atoms, [reference(atoms, "crashed")])
    assert LabelStore(path).status(key, "reference") == LabelStatus.ok
    assert store.get(key, "reference").values == {"energy": -1.0}


def test_ok_labels_are_replaced_only_by_more(path):
    store = LabelStore(path)
    atoms = helium(0)
    key = structure_key(atoms)
    store.add(atoms, [reference(atoms)])
    assert not store.has(key, "reference", ["energy", "forces"])
    store.add(atoms, [reference(atoms, energy=-2.0)])
    assert store.get(key, "reference").values["energy"] == -1.0
    store.add(atoms, [reference(atoms, energy=-3.0, forces=True)])
    store.add(atoms, [reference(atoms, energy=-4.0)])
    assert store.get(key, "reference").values["energy"] == -3.0
    assert store.has(key, "reference", ["energy", "forces"])


def test_values_that_differ_are_joined(path):
    atoms = helium(0)
    key, whole = structure_key(atoms), reference(atoms, forces=True)
    with_stress = replace(whole, values={"energy": -5.0, "stress": np.arange(6.0)})
    for labels in ([with_stress, whole], [whole, with_stress]):
        store = LabelStore(path.with_name(f"{labels[0].values['energy']}{path.suffix}"))
        for label in labels:
            store.add(atoms, [label])
        for view in (store, LabelStore(store.path)):
            assert view.has(key, "reference", ["energy", "forces", "stress"])
            found = view.get(key, "reference")
            assert found.values["energy"] == labels[1].values["energy"]
            np.testing.assert_array_equal(found.values["stress"], np.arange(6.0))
            np.testing.assert_array_equal(found.values["forces"], whole.values["forces"])
            assert found.wall_time_s == 1.0


def test_lookups(path):
    store = LabelStore(path)
    pool = [helium(i) for i in range(4)]
    statuses = ["ok", "failed", "ok"]
    store.add_many((a, [reference(a, s)]) for a, s in zip(pool, statuses, strict=False))
    store.add(pool[3], [])
    keys = [structure_key(atoms) for atoms in pool]
    for view in (store, LabelStore(path)):
        assert len(view) == 3
        assert view.keys() == keys[:3]
        assert view.keys("reference", LabelStatus.ok) == [keys[0], keys[2]]
        assert view.keys(status=LabelStatus.failed) == [keys[1]]
        assert view.keys("charges") == []
        assert view.status(keys[3], "reference") is None
        assert view.get(keys[0], "charges") is None
        assert view.census() == {"reference": {"ok": 2, "failed": 1, "wall_time_s": 1.5}}
        assert view.wall_times("reference") == {keys[0]: 0.5, keys[2]: 0.5}
        assert view.wall_times("charges") == {}
        assert view.provenance("reference") == PROVENANCE
        assert view.provenance("charges") is None
        order = [keys[2], keys[0]]
        assert [atoms.info["structure_key"] for atoms in view.labelled_atoms(order)] == order
        with pytest.raises(MissingLabelError, match=rf"{keys[3]} \(1 of 2 are missing\)"):
            view.labelled_atoms([keys[0], keys[3]])


@pytest.mark.parametrize(
    "other",
    [
        Provenance("PBE0", "code", "1.0", {"cutoff": 500}),
        Provenance("PBE", "code", "1.1", {"cutoff": 500}),
        Provenance("PBE", "code", "1.0", {"cutoff": 600}),
    ],
)
def test_methods_are_not_mixed(path, other):
    store = LabelStore(path)
    store.add(helium(0), [reference(helium(0))])
    good, bad = reference(helium(1)), reference(helium(2), provenance=other)
    for view in (store, LabelStore(path)):
        with pytest.raises(LabelConflictError) as caught:
            view.add_many([(helium(1), [good]), (helium(2), [bad])])
        assert "PBE (code 1.0; cutoff=500)" in str(caught.value)
        assert str(other) in str(caught.value)
        assert len(view) == len(LabelStore(path)) == 1  # the good one is not half of it


def test_a_failed_addition_leaves_no_provenance(path):
    store = LabelStore(path)
    other = Provenance("PBE0", "code", "1.0")
    with pytest.raises(LabelConflictError):
        store.add_many(
            [
                (helium(0), [reference(helium(0))]),
                (helium(1), [reference(helium(1), provenance=other)]),
            ]
        )
    assert store.provenance("reference") is None
    store.add(helium(1), [reference(helium(1), provenance=other)])
    assert LabelStore(path).provenance("reference") == other


def test_labels_of_another_structure_are_refused(path):
    with pytest.raises(LabelError, match="was added to"):
        LabelStore(path).add(helium(0), [reference(helium(1))])


LABELS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from(KINDS),
        st.sampled_from([*LabelStatus]),
        st.booleans(),
    ),
    max_size=12,
)


def label_of(number, kind, status, forces):
    base = reference(helium(number), str(status), forces=forces)
    return Label(base.key, kind, base.status, PROVENANCE, base.values, 0.5, base.message)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LABELS, st.data())
def test_merging_in_any_order_and_batches(tmp_path_factory, wanted, data):
    """Whatever the order and the batches, the best label of each kind is kept."""
    folder = tmp_path_factory.mktemp("merge")
    labels = [(number, label_of(number, *rest)) for number, *rest in wanted]
    shuffled = data.draw(st.permutations(labels))
    cut = data.draw(st.integers(0, len(labels)))
    one, many = LabelStore(folder / "one.db"), LabelStore(folder / "many.db")
    one.add_many((helium(number), [label]) for number, label in labels)
    for batch in (shuffled[:cut], shuffled[cut:], shuffled):
        many.add_many((helium(number), [label]) for number, label in batch)
    for store in (one, many, LabelStore(folder / "many.db")):
        for number, kind in itertools.product(range(4), KINDS):
            given_here = [lb for n, lb in labels if n == number and lb.kind == kind]
            key = structure_key(helium(number))
            if not given_here:
                assert store.status(key, kind) is None
                continue
            best = max((lb.status == "ok", len(lb.values)) for lb in given_here)
            found = store.get(key, kind)
            assert (found.status == "ok", len(found.values)) == best


def test_two_writers_see_each_other(path):
    first, second = LabelStore(path), LabelStore(path)
    first.add(helium(0), [reference(helium(0))])
    second.add(helium(0), [reference(helium(0), "failed")])
    second.add(helium(1), [reference(helium(1))])
    assert second.status(structure_key(helium(0)), "reference") == LabelStatus.ok
    first.refresh()
    assert first.keys() == second.keys() == [structure_key(helium(i)) for i in range(2)]
    with pytest.raises(LabelConflictError):
        first.add(helium(2), [reference(helium(2), provenance=Provenance("X", "y", "2"))])


def test_a_large_batch_is_one_transaction(tmp_path):
    """ase.db by itself commits after each 5000 rows."""
    store = LabelStore(tmp_path / "labels.db")
    label = reference(helium(0))
    pool = [helium(i) for i in range(5200)]

    def interrupted():
        for atoms in pool:
            yield (
                atoms,
                [Label(structure_key(atoms), "reference", label.status, PROVENANCE, label.values)],
            )
        yield (helium(-1), [label])  # of another structure

    with pytest.raises(LabelError, match="was added to"):
        store.add_many(interrupted())
    assert len(LabelStore(store.path)) == len(store) == 0


WRITER = """
import sys
sys.path.insert(0, {tests!r})
from test_labels_store import LabelStore, helium, reference
store = LabelStore({path!r})
print("ready", flush=True)
for number in range(100000):
    pool = [helium(3 * number + i) for i in range(3)]
    store.add_many([(atoms, [reference(atoms)]) for atoms in pool])
"""


def test_a_killed_writer_leaves_whole_batches(path):
    folder = os.path.dirname(__file__)
    script = WRITER.format(tests=folder, path=str(path))
    search_path = os.pathsep.join([os.path.dirname(folder), *sys.path])
    for kill_after in (0.05, 0.2):
        writer = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
        )
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(kill_after)
        writer.kill()
        writer.wait()
        writer.stdout.close()
    store = LabelStore(path)
    assert len(store) > 0
    assert len(store) % 3 == 0
    assert len(store.labelled_atoms()) == len(store)
    store.add(helium(-1), [reference(helium(-1))])
    assert len(LabelStore(path)) == len(store)


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_labels_store import LabelStore, LabelError, helium, reference
store = LabelStore({path!r})
store.add(helium(-1), [reference(helium(-1))])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
written = 0
try:
    for start in range(0, 5000, 100):
        pool = [helium(start + i) for i in range(100)]
        store.add_many([(atoms, [reference(atoms)]) for atoms in pool])
        written += 100
except LabelError as error:
    assert "cannot be read or written" in str(error), error
    assert len(store) == written + 1
    print(written)
"""


def test_a_full_disk_is_an_error_and_nothing_is_half_written(tmp_path):
    folder = os.path.dirname(__file__)
    path = tmp_path / "labels.db"
    search_path = os.pathsep.join([os.path.dirname(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK.format(tests=folder, path=str(path))],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": search_path},
    )
    store = LabelStore(path)
    assert len(store) == int(done.stdout) + 1 < 5000
    assert len(store.labelled_atoms()) == len(store)


def test_a_locked_file_is_an_error(tmp_path, monkeypatch):
    store = LabelStore(tmp_path / "labels.db")
    real = sqlite3.connect
    monkeypatch.setattr("ase.db.sqlite.sqlite3.connect", lambda name, timeout: real(name, 0.1))
    other = real(store.path)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LabelError, match="database is locked"):
        store.add(helium(0), [reference(helium(0))])
    other.rollback()
    other.close()
    store.add(helium(0), [reference(helium(0))])
    assert len(LabelStore(store.path)) == 1


def test_ases_own_tools_work_on_it(path):
    store = LabelStore(path)
    atoms = structures.ethanol()
    store.add(atoms, [OrbitalChargeLabeler().label(atoms), reference(atoms, forces=True)])
    store.add(helium(0), [reference(helium(0), "timeout")])
    database = ase.db.connect(str(path))
    row = database.get(reference_status="ok")
    assert row.energy == -1.0
    assert row.calculator == "pbe"
    assert row.structure_key == structure_key(atoms)
    assert row.charges_status == "ok"
    assert row.reference_values == "energy forces"
    assert row.toatoms().get_potential_energy() == -1.0
    assert len(list(database.select(reference_status="timeout"))) == 1


def test_files_that_are_no_store(tmp_path):
    with pytest.raises(LabelError, match=r"must end in \.db or \.aselmdb"):
        LabelStore(tmp_path / "labels.json")
    with pytest.raises(LabelError, match="does not exist"):
        LabelStore(tmp_path / "typo.db", create=False)
    assert not (tmp_path / "typo.db").exists()
    foreign = tmp_path / "foreign.db"
    ase.db.connect(str(foreign)).write(Atoms("He"))
    with pytest.raises(LabelError, match="no label store"):
        LabelStore(foreign)
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"this is no database" * 100)
    with pytest.raises(LabelError, match=r"garbage\.db' cannot be read or written"):
        LabelStore(garbage)
    for number, remedy in ((99, "update orbcalc"), (1, "label again")):
        other = LabelStore(tmp_path / f"format_{number}.db")
        metadata = {"orbcalc": {"format": number, "revision": 0, "provenance": {}, "shells": {}}}
        ase.db.connect(str(other.path)).metadata = metadata
        with pytest.raises(LabelError, match=f"format {number}; this version reads 2: {remedy}"):
            LabelStore(other.path)
        assert is_label_store(other.path)
    for name in ("foreign.db", "garbage.db", "typo.db", "labels.xyz"):
        assert not is_label_store(tmp_path / name)


def test_missing_lmdb_backend_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ase_db_backends", None)
    monkeypatch.setitem(sys.modules, "ase_db_backends.aselmdb", None)
    with pytest.raises(LabelError, match="pip install ase-db-backends"):
        LabelStore(tmp_path / "labels.aselmdb")
