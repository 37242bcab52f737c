"""Five picoseconds of NVE dynamics with the potential of the quickstart."""

import ase.io
from ase import units
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from orbcalc import OrbcalcCalculator

atoms = ase.io.read("examples/quickstart/acetylacetone.xyz")
atoms.calc = OrbcalcCalculator("runs/quickstart/model.orbcalc")
thermalize_momenta(atoms, temperature_K=300)
Stationary(atoms)
md = VelocityVerlet(atoms, 0.5 * units.fs, trajectory="runs/quickstart/md.traj", loginterval=100)
md.attach(
    lambda: print(f"{md.get_time() / units.fs:5.0f} fs {atoms.get_total_energy():.4f} eV"), 1000
)
md.run(10_000)
