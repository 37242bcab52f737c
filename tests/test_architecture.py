"""What imports what, and what importing leaves alone."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import orbcalc

ROOT = Path(__file__).parent.parent
HEAVY = "{'torch', 'e3nn', 'dask', 'distributed', 'tblite', 'numpy', 'ase'}"

#: Everything of the process that an import could disturb.
STATE = """
import os, sys, warnings, logging, random, decimal, locale
import numpy, torch, ase.calculators.calculator as ase_calculators, ase.io.formats as formats
import ase.db, yaml, matplotlib
def state():
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "dtype": torch.get_default_dtype(),
        "torch threads": torch.get_num_threads(),
        "torch seed": torch.initial_seed(),
        "torch state": torch.get_rng_state().tolist(),
        "numpy state": numpy.random.get_state()[1].tolist(),
        "numpy errors": numpy.geterr(),
        "random state": random.getstate(),
        "ase names": list(ase_calculators.names),
        "ase calculators": sorted(ase_calculators.external_calculators),
        "ase properties": list(ase_calculators.all_properties),
        "ase formats": sorted(formats.ioformats),
        "log handlers": list(logging.getLogger().handlers),
        "log level": logging.getLogger().level,
        "excepthook": sys.excepthook,
        "folder": os.getcwd(),
    }
"""


def run(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_contracts_hold() -> None:
    report = run(
        "import sys; from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True))"
    )
    assert "5 kept, 0 broken" in report


def test_one_module_writes_files() -> None:
    writing = re.compile(
        r"""\.write_(text|bytes)\(|\.open\(["'][wx]|\bopen\([^)]*["'][wx]b?["']|\.tmp\b|"""
        r"""os\.(replace|rename)\b|\.rename\(|shutil\.(copy|move)"""
    )
    found = {p.name for p in (ROOT / "orbcalc").rglob("*.py") if writing.search(p.read_text())}
    assert found == {"files.py"}


def test_the_top_module_loads_nothing() -> None:
    assert run(f"import orbcalc, sys; print({HEAVY} & set(sys.modules))") == "set()\n"


def test_the_command_line_loads_nothing_before_it_knows_the_command() -> None:
    assert run(f"import orbcalc.cli, sys; print({HEAVY} & set(sys.modules))") == "set()\n"


def test_no_module_is_too_long_to_be_read() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in (ROOT / "orbcalc").rglob("*.py")}
    assert [path.name for path, length in lengths.items() if length > 450] == []


@pytest.mark.parametrize("module", ["store", "xtb", "reference", "dft", "process", "worker"])
def test_labels_load_neither_torch_nor_dask(module: str) -> None:
    loaded = "{'torch', 'e3nn', 'dask', 'distributed'} & set(sys.modules)"
    assert run(f"import orbcalc.labels.{module}, sys; print({loaded})") == "set()\n"


def test_public_names_are_those_of_their_modules() -> None:
    import orbcalc.active.labelling
    import orbcalc.active.loop
    import orbcalc.calculator
    import orbcalc.prediction
    import orbcalc.results
    import orbcalc.training.run

    assert orbcalc.OrbcalcCalculator is orbcalc.calculator.OrbcalcCalculator
    assert orbcalc.predict is orbcalc.prediction.predict
    assert orbcalc.results_of is orbcalc.results.results_of
    assert orbcalc.with_results is orbcalc.results.with_results
    assert orbcalc.label is orbcalc.active.labelling.label
    assert orbcalc.train is orbcalc.training.run.train
    assert orbcalc.run is orbcalc.active.loop.run
    assert set(orbcalc.__all__) <= set(dir(orbcalc))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'orbcalc' has no attribute 'potential'"):
        orbcalc.potential  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_has_one_source() -> None:
    assert version("orbcalc") == orbcalc.__version__


def test_importing_everything_leaves_the_process_alone() -> None:
    modules = sorted(
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "orbcalc").rglob("*.py")
    )
    # distributed and the like are loaded first: what they do to a process is not ours.
    code = f"""
{STATE}
import distributed, e3nn, e3nn.o3, tblite.interface, vesin, typer, rich.progress, rich.table
import jinja2, matplotlib.pyplot, scipy.stats, scipy.special, pydantic, safetensors.torch
import jaxtyping
before = state()
import importlib
for module in {modules!r}:
    importlib.import_module(module)
after = state()
print(len({modules!r}), [name for name in before if before[name] != after[name]])
"""
    assert run(code) == f"{len(modules)} []\n"


def test_md_with_gfn1_leaves_the_process_alone() -> None:
    code = f"""
{STATE}
import tblite.interface
from ase.build import molecule
from orbcalc.labels.xtb import make_ase_calculator
before = state()
atoms = molecule("H2O")
atoms.calc = make_ase_calculator("GFN1-xTB", atoms)
atoms.get_forces()
after = state()
print([name for name in before if before[name] != after[name]], "tblite.ase" in sys.modules)
"""
    assert run(code) == "[] False\n"
