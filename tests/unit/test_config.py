"""Configurations: helpful errors, paths, round trips, rules that span several keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orbcalc.config import (
    LabelConfig,
    MDConfig,
    PotentialConfig,
    RunConfig,
    TrainConfig,
    dump_config,
    load_config,
    parse_config,
)
from orbcalc.errors import ConfigError, OrbcalcError

ROOT = Path(__file__).parents[2]
RUN = {"pool": {"structures": "pool.xyz"}}
TRAIN = {"train": "train.xyz"}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            TrainConfig,
            TRAIN | {"optimizer": {"learning_rat": 0.1}},
            "unknown key 'learning_rat' in [optimizer]; did you mean 'learning_rate'?",
        ),
        (TrainConfig, TRAIN | {"sed": 1}, "unknown key 'sed'; did you mean 'seed'?"),
        (
            TrainConfig,
            TRAIN | {"tasks": {"xyz": 1}},
            "unknown key 'xyz' in [tasks]; known keys: energy, forces, stress, charges",
        ),
        (
            RunConfig,
            {"pool": {"start": "a.xyz", "md": {"temperature": 300}}},
            "unknown key 'temperature' in [pool.md]; did you mean 'temperature_K'?",
        ),
        (
            RunConfig,
            RUN | {"labels": {"reference": {"calculater": "pyscf"}}},
            "unknown key 'calculater' in [labels.reference]; did you mean 'calculator'?",
        ),
        (TrainConfig, {}, "missing key 'train'"),
        (RunConfig, {}, "missing key 'pool'"),
        (
            TrainConfig,
            TRAIN | {"potential": {"cutoff": 50}},
            "potential.cutoff: Input should be less than or equal to 20",
        ),
        (TrainConfig, TRAIN | {"potential": {"cutoff": float("nan")}}, "potential.cutoff"),
        (
            TrainConfig,
            TRAIN | {"dtype": "float16"},
            "dtype: Input should be 'float32' or 'float64'",
        ),
        (TrainConfig, TRAIN | {"committee": 0}, "committee"),
        (TrainConfig, TRAIN | {"valid": 1.5}, "valid"),
    ],
)
def test_what_a_config_error_says(model, data, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(data, model, source="my.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("my.yaml:\n")
    assert isinstance(caught.value, OrbcalcError)
    assert isinstance(caught.value, ValueError)


def test_all_problems_are_listed():
    data = {"optimizer": {"learning_rat": 0.1, "steps": -1}, "comittee": 2}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, TrainConfig)
    for word in ("learning_rat", "optimizer.steps", "did you mean 'committee'", "'train'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (PotentialConfig, {"l_max": 1, "message_l_max": 2}, "message_l_max 2 exceeds l_max 1"),
        (
            PotentialConfig,
            {"l_max": 0, "message_l_max": 0},
            "charge_head: equivariant needs l_max >= 1 .*choose charge_head: invariant",
        ),
        (
            TrainConfig,
            TRAIN | {"tasks": {"energy": 0, "forces": 0, "charges": 0}},
            "all weights are 0: nothing would be learned",
        ),
        (
            TrainConfig,
            TRAIN | {"potential": {"charge_head": "none"}},
            "tasks.charges has weight, but potential.charge_head is none",
        ),
        (
            TrainConfig,
            TRAIN | {"tasks": {"xtb_forces": 1}, "potential": {"xtb_head": "none"}},
            "tasks.xtb_forces has weight, but potential.xtb_head is none",
        ),
        (TrainConfig, TRAIN | {"valid": 1.0}, "is not a fraction between 0 and 1"),
        (RunConfig, {"pool": {}}, "the pool is empty"),
        (
            RunConfig,
            {
                "pool": {"structures": "a.extxyz", "charges": True},
                "potential": {"energy_head": "process"},
                "tasks": {"energy": 0, "forces": 0},
            },
            r"fitted to energies, but tasks\.energy is 0",
        ),
        (RunConfig, {"pool": {"md": {}}}, "md needs starting structures"),
        (
            RunConfig,
            RUN | {"labels": {"charges": False}},
            "tasks.charges has weight, but labels.charges is false",
        ),
        (
            RunConfig,
            RUN | {"potential": {"charge_head": "none"}},
            "tasks.charges has weight, but potential.charge_head is none",
        ),
        (
            RunConfig,
            RUN
            | {"pool": {"structures": "a.xyz", "charges": True}}
            | {"labels": {"charges": False}, "tasks": {"charges": 0}},
            "pool.charges is true, but labels.charges is false",
        ),
        (
            RunConfig,
            RUN | {"pool": {"structures": "a.xyz", "charges": True, "features": "m.orbcalc"}},
            "pool.features are what a process is fitted on",
        ),
        (
            RunConfig,
            RUN | {"labels": {"forces": False}},
            "tasks.forces has weight, but labels.forces is false",
        ),
        (
            RunConfig,
            RUN
            | {
                "labels": {"charges": False},
                "tasks": {"charges": 0},
                "potential": {"xtb_head": "task"},
            },
            "potential.xtb_head: task learns GFN1-xTB energies, but labels.charges is false",
        ),
        (
            RunConfig,
            RUN | {"tasks": {"stress": 1.0}},
            "tasks.stress has weight, but labels.stress is false",
        ),
        (
            RunConfig,
            {
                "pool": {"start": "a.xyz", "md": {}},
                "labels": {"reference": {"calculator": "file"}},
            },
            "cannot label structures made by md",
        ),
    ],
)
def test_contradictions(model, data, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(data, model)


def test_inputs_start_at_the_file_and_outputs_where_we_run(tmp_path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    absolute = tmp_path / "elsewhere" / "c.db"
    (folder / "train.yaml").write_text(
        f"train: [a.xyz, ../b.xyz, {absolute}]\nvalid: v.xyz\nstart_from: m.orbcalc\n"
        f"output: out/model.orbcalc\n"
    )
    config = load_config(Path("study/train.yaml"), TrainConfig)
    assert config.train == (folder / "a.xyz", tmp_path / "b.xyz", absolute)
    assert config.valid == (folder / "v.xyz",)
    assert config.start_from == folder / "m.orbcalc"
    assert config.output == Path("out/model.orbcalc")


def test_nested_paths_are_resolved_too(tmp_path):
    (tmp_path / "run.yaml").write_text("pool: {start: a.xyz, structures: [b.xyz], md: {}}\n")
    config = load_config(tmp_path / "run.yaml", RunConfig)
    assert config.pool.start == (tmp_path / "a.xyz",)
    assert config.pool.structures == (tmp_path / "b.xyz",)
    assert config.output == Path("run")


def test_a_fraction_is_not_a_path():
    assert parse_config(TRAIN | {"valid": 0.25}, TrainConfig).valid == 0.25
    assert parse_config(TRAIN | {"valid": "0.25"}, TrainConfig).valid == (Path("0.25"),)


@pytest.mark.parametrize("model", [TrainConfig, RunConfig])
def test_what_is_dumped_can_be_loaded(model, tmp_path):
    data = TRAIN if model is TrainConfig else RUN
    config = parse_config(data, model, folder=tmp_path)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml", model) == config
    written = yaml.safe_load(dump_config(config))
    assert set(written) == set(model.model_fields), "every default is spelled out"


def test_configurations_do_not_change():
    config = parse_config(TRAIN, TrainConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    assert LabelConfig().reference is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [a", "is not valid YAML"),
        ("- a\n- b\n", "must hold keys and values, got list"),
        ("", "must hold keys and values, got NoneType"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml", TrainConfig)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml", TrainConfig)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / "binary.yaml", TrainConfig)


def test_numbers_in_scientific_notation(tmp_path):
    """YAML 1.1 takes 1e-3 for text, which pydantic turns into a number all the same."""
    (tmp_path / "train.yaml").write_text("train: a.xyz\noptimizer: {learning_rate: 1e-3}\n")
    assert load_config(tmp_path / "train.yaml", TrainConfig).optimizer.learning_rate == 1e-3


def test_every_key_of_a_schema_has_a_type():
    for model in (TrainConfig, RunConfig):
        schema = model.model_json_schema()
        assert schema["additionalProperties"] is False
        assert set(schema["properties"]) == set(model.model_fields)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/config.yaml")), ids=str)
def test_examples_are_valid(path):
    config = load_config(path, RunConfig)
    assert config.pool.start or config.pool.structures
    for structures in (*config.pool.start, *config.pool.structures):
        assert structures.exists()


@pytest.mark.parametrize(
    ("certificate", "message"),
    [
        ({"tolerance": 0.01, "mean_error": 0.02}, "mean_error exceeds the tolerance"),
        ({"mean_error": 0.001, "method": "kl_batch"}, "which kl_batch has not"),
        ({"quantity": "force"}, "energy_per_atom"),
    ],
)
def test_certificates_that_cannot_be_are_refused(certificate, message: str) -> None:
    data = {"pool": {"structures": "pool.xyz"}, "certificate": certificate}
    with pytest.raises(ConfigError, match=message):
        parse_config(data, RunConfig)


def test_starts_without_md_are_refused() -> None:
    data = {"pool": {"structures": "pool.xyz", "start": "start.xyz"}}
    with pytest.raises(ConfigError, match="there is no `md`"):
        parse_config(data, RunConfig)


@pytest.mark.parametrize("method", ["diversity", "random"])
def test_costs_divide_no_scores_that_are_not_there(method: str) -> None:
    data = {"pool": {"structures": "pool.xyz"}, "selection": {"method": method}}
    parse_config(data, RunConfig)
    data["selection"]["cost_aware"] = True
    with pytest.raises(ConfigError, match=f"{method} has no scores"):
        parse_config(data, RunConfig)


def test_a_certificate_of_forces_needs_labels_of_forces() -> None:
    data = {
        "pool": {"structures": "pool.xyz"},
        "labels": {"forces": False},
        "tasks": {"forces": 0},
        "certificate": {"quantity": "forces"},
    }
    with pytest.raises(ConfigError, match=r"quantity is forces, but labels\.forces is false"):
        parse_config(data, RunConfig)


@pytest.mark.parametrize(
    ("given", "weight"),
    [({}, 1), ({"forces": 0}, 30), ({"forces": 0.0, "charges": 2}, 2), ({"charges": 0}, 0)],
)
def test_charges_weigh_more_where_there_are_no_forces(
    given: dict[str, float], weight: float
) -> None:
    config = parse_config(TRAIN | {"tasks": given}, TrainConfig, source="a test")
    assert config.tasks.charges == weight
    again = parse_config(config.model_dump(mode="json"), TrainConfig, source="a test")
    assert again.tasks == config.tasks


@pytest.mark.parametrize(
    ("given", "uniform", "varied"),
    [
        ({}, (2, 4), (8, 16)),
        ({"tasks": {"forces": 0}}, (8, 16), (8, 16)),
        ({"tasks": {"forces": 0, "xtb_forces": 1}}, (2, 4), (8, 16)),
        ({"optimizer": {"batch_size": 5}}, (5, 10), (5, 10)),
        ({"optimizer": {"batch_size": 3, "cheap_batch_size": 0}}, (3, 0), (3, 0)),
    ],
)
def test_steps_are_small_where_forces_of_one_composition_are_learned(
    given: dict[str, object], uniform: tuple[int, int], varied: tuple[int, int]
) -> None:
    config = parse_config(TRAIN | given, TrainConfig, source="a test")
    again = parse_config(config.model_dump(mode="json"), TrainConfig, source="a test")
    for one in (config, again):
        assert one.batch_sizes(is_varied=False, n_atoms=20.0) == uniform
        assert one.batch_sizes(is_varied=True, n_atoms=20.0) == varied


@pytest.mark.parametrize(("n_atoms", "size"), [(64.0, 8), (120.0, 4), (500.0, 2)])
def test_a_step_has_fewer_structures_if_they_are_large(n_atoms: float, size: int) -> None:
    config = parse_config(TRAIN, TrainConfig, source="a test")
    assert config.batch_sizes(is_varied=True, n_atoms=n_atoms) == (size, 2 * size)
    assert config.batch_sizes(is_varied=False, n_atoms=n_atoms) == (2, 4)
    energies = parse_config(TRAIN | {"tasks": {"forces": 0}}, TrainConfig, source="a test")
    assert energies.batch_sizes(is_varied=True, n_atoms=n_atoms) == (8, 16)


@pytest.mark.parametrize(
    ("given", "is_varied", "factors"),
    [
        ({}, True, (16, 0)),
        ({}, False, (1, 0)),
        ({"optimizer": {"late_energy": 3}}, False, (3, 0)),
        ({"tasks": {"xtb_energy": 2, "xtb_forces": 5}}, True, (16, 32)),
        ({"tasks": {"forces": 0, "xtb_energy": 2}}, True, (1, 2)),
        ({"tasks": {"energy": 0}}, True, (0, 0)),
    ],
)
def test_energies_beside_forces_weigh_more_in_the_end(
    given: dict[str, object], is_varied: bool, factors: tuple[float, float]
) -> None:
    config = parse_config(TRAIN | given, TrainConfig, source="a test")
    late = config.late_tasks(config.tasks, is_varied=is_varied)
    assert (late.energy, late.xtb_energy or 0) == factors
    assert (late.forces, late.charges) == (config.tasks.forces, config.tasks.charges)


@pytest.mark.parametrize(
    ("given", "cheap_only", "head", "weights"),
    [
        ({}, False, "none", (0, 0)),
        ({}, True, "baseline", (1, 30)),
        ({"tasks": {"forces": 0}}, True, "baseline", (30, 0)),
        ({"tasks": {"xtb_energy": 0}}, True, "none", (0, 0)),
        ({"tasks": {"xtb_energy": 2}}, False, "baseline", (2, 30)),
        ({"potential": {"xtb_head": "none"}}, True, "none", (0, 0)),
        ({"potential": {"xtb_head": "task"}}, False, "task", (1, 30)),
    ],
)
def test_the_gfn1_energy_is_learned_where_it_pays(
    given: dict[str, object], cheap_only: bool, head: str, weights: tuple[float, float]
) -> None:
    config = parse_config(TRAIN | given, TrainConfig, source="a test")
    resolved = config.resolved(cheap_only=cheap_only)
    assert resolved.potential.xtb_head == head
    assert (resolved.tasks.xtb_energy, resolved.tasks.xtb_forces) == weights
    again = parse_config(resolved.model_dump(mode="json"), TrainConfig, source="a test")
    assert again.resolved(cheap_only=not cheap_only) == resolved


@pytest.mark.parametrize(
    ("given", "few", "head"),
    [
        ({"tasks": {"forces": 0}}, True, "process"),
        ({"tasks": {"forces": 0}}, False, "network"),
        ({}, True, "network"),
        ({"tasks": {"forces": 0, "energy": 0}}, True, "network"),
        ({"tasks": {"forces": 0, "xtb_energy": 0}}, True, "network"),
        ({"tasks": {"forces": 0}, "potential": {"xtb_head": "task"}}, True, "network"),
        ({"tasks": {"forces": 0}, "potential": {"baseline": "GFN1-xTB"}}, True, "network"),
        ({"tasks": {"forces": 0}, "reference_energies": {"H": -13.6}}, True, "network"),
        ({"tasks": {"forces": 0}, "potential": {"energy_head": "network"}}, True, "network"),
        ({"tasks": {"forces": 0}, "potential": {"energy_head": "process"}}, False, "process"),
    ],
)
def test_a_process_is_fitted_where_it_pays(given: dict[str, object], few: bool, head: str) -> None:
    config = parse_config(TRAIN | given, TrainConfig, source="a test")
    resolved = config.resolved(cheap_only=True, few_energies=few)
    assert resolved.potential.energy_head == head
    if head == "process":
        assert resolved.potential.xtb_head == "baseline"
    again = parse_config(resolved.model_dump(mode="json"), TrainConfig, source="a test")
    assert again.resolved(cheap_only=True, few_energies=not few) == resolved


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"potential": {"energy_head": "process"}}, "learn energy and forces"),
        (
            {"potential": {"energy_head": "process"}, "tasks": {"forces": 0, "stress": 1}},
            "learn energy and stress",
        ),
        (
            {"potential": {"energy_head": "process"}, "tasks": {"forces": 0, "xtb_energy": 0}},
            r"tasks\.xtb_energy is 0",
        ),
        (
            {
                "potential": {"energy_head": "process"},
                "tasks": {"forces": 0},
                "reference_energies": {"H": -13.6},
            },
            "those of lone atoms",
        ),
        (
            {
                "potential": {"energy_head": "process", "xtb_head": "task"},
                "tasks": {"forces": 0},
            },
            "xtb_head is task",
        ),
        (
            {
                "potential": {"energy_head": "process", "baseline": "GFN1-xTB"},
                "tasks": {"forces": 0},
            },
            "a computed one",
        ),
    ],
)
def test_a_process_that_could_not_be_fitted_is_refused(
    given: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(TRAIN | given, TrainConfig, source="a test")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "0.1e-2", ".1e-2", "1.0e-3"])
def test_numbers_with_exponents_are_numbers(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "pool: {structures: a.xyz}\n"
        f"labels: {{reference: {{arguments: {{accuracy: {text}, name: e-3, other: '{text}'}}}}}}\n"
    )
    arguments = load_config(path, RunConfig).labels.reference.arguments
    assert arguments == {"accuracy": 0.001, "name": "e-3", "other": text}


def test_dynamics_propose_something() -> None:
    with pytest.raises(ValueError, match="10 steps end before the first structure, after 20"):
        MDConfig(steps=10)
